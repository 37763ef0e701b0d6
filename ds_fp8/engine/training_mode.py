"""A model that is trained in eval mode: `from_pretrained` gives a model in that mode, and a script may mean it (no
dropout).

Eval mode alone does not tell training from evaluation, and neither do gradients: many scripts evaluate without
`no_grad`. An optimizer step does. So after a step in eval mode a forward with gradients is training in that mode as
well: FP8, and its amaxes count. Without gradients it stays evaluation, in high precision. The first such step has run
in high precision. A step in train mode ends it. `fp8/eval` false keeps eval mode in high precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .printing import print_rank_0


@dataclass
class TrainingMode:
    """began  the last step was the first of some in eval mode, so that its layers have run in high precision
    told   the user knows
    """

    began: bool = False
    told: bool = False

    def follow(self, attachment: Any) -> None:
        """A step is taken; nothing is communicated."""
        in_eval = not attachment.model.training and attachment.settings.fp8.eval is not False
        self.began = attachment.fp8_state.follow_mode(in_eval) and not attachment.plan.fp8.eval
        if self.began and not self.told:
            self.told = True
            print_rank_0(
                "a step was taken in eval mode, in which from_pretrained gives a model: from now on forwards with "
                "gradients run in FP8 in that mode too, those without in high precision; engine.train() turns dropout "
                "on, fp8/eval false keeps high precision"
            )
