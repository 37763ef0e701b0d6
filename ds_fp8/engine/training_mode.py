"""A model that is trained in eval mode: `from_pretrained` gives a model in that mode, and a script may mean it (no
dropout).

Eval mode alone does not tell training from evaluation, and neither do gradients: many scripts evaluate without
`no_grad`. An optimizer step does. So after a step in eval mode a forward with gradients is training in that mode as
well: FP8, and its amaxes count. Without gradients it stays evaluation, in high precision. The first such step has run
in high precision. A step in train mode ends it. `fp8/eval` false keeps eval mode in high precision.

A forward of the model is asked once, at its beginning, whether it has gradients. Under reentrant checkpointing its
layers run without them at first, and must not compute otherwise than the recompute.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from .printing import print_rank_0


@dataclass
class TrainingMode:
    """began  the last step was the first of some in eval mode, so that its layers have run in high precision
    told   the user knows
    """

    began: bool = False
    told: bool = False
    _hooks: list[Any] = field(default_factory=list)

    def follow(self, attachment: Any) -> None:
        """A step is taken; nothing is communicated."""
        in_eval = not attachment.model.training and attachment.settings.fp8.eval is not False
        self.began = attachment.fp8_state.follow_mode(in_eval) and not attachment.plan.fp8.eval
        self._listen(attachment)
        if self.began and not self.told:
            self.told = True
            print_rank_0(
                "a step was taken in eval mode, in which from_pretrained gives a model: from now on forwards with "
                "gradients run in FP8 in that mode too, those without in high precision; engine.train() turns dropout "
                "on, fp8/eval false keeps high precision"
            )

    def resume(self, attachment: Any) -> None:
        """A checkpoint is loaded; its run may have been told otherwise by `fp8/eval`."""
        if attachment.settings.fp8.eval is False:
            attachment.fp8_state.follow_mode(False)
        self._listen(attachment)

    def _listen(self, attachment: Any) -> None:
        if not attachment.fp8_state.trains_in_eval:
            self.stop()
        elif not self._hooks:
            model, fp8_state = attachment.model, attachment.fp8_state
            self._hooks = [
                model.register_forward_pre_hook(functools.partial(_begins, fp8_state)),
                model.register_forward_hook(functools.partial(_ends, fp8_state)),
            ]

    def stop(self) -> None:
        """No hook on the model from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _begins(fp8_state: Any, model: torch.nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        fp8_state.in_forward_with_grad = torch.is_grad_enabled()


def _ends(fp8_state: Any, model: torch.nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        fp8_state.in_forward_with_grad = False
