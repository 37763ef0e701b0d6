"""Delayed scaling: the scale of this step comes from the amaxes of earlier ones.

Why: measuring a tensor and casting it in one pass needs the scale beforehand. Neighbouring steps look alike, so the
largest amax of the last `amax_history_len` steps is a good guess, and what exceeds it saturates for one step.

One `update` per step, in Transformer Engine's order and layout (its golden vectors hold this file bit for bit):

    slot 0 of the history  <- the amax of the step
    amax                    = max over the history, or slot 0 (`most_recent`)
    scale                   = (format.max / amax) / 2 ** margin; a non-finite amax keeps the previous scale
    the history rolls by -1, slot 0 is zeroed

A column whose amax of the step is zero is left alone, history and scale: its layer did not run, or the tensor was all
zeros. So a step without a backward does not age the gradients' histories. So is one whose amax is not finite: in
Transformer Engine it stays in the history like any other, and under `max` holds the scale still until it rolls out,
1024 steps after one bad batch that everybody skipped (`keeps_non_finite`, JSON key `fp8/amax_rules`).
Source: Transformer Engine 2.x, delayed scaling.
"""

from __future__ import annotations

import torch

from ..formats import Format
from ..numerics.scaling import scale_from_amax
from ..recipe import Recipe


class AmaxHistory:
    """Histories and scales of many tensors of one format, updated together.

    history  [amax_history_len, columns] fp32
    scale    [columns] fp32, a view into the scales of all columns: updated in place, so its address never changes
    updates  updates so far
    """

    def __init__(self, recipe: Recipe, fmt: Format, scale: torch.Tensor, *, keeps_non_finite: bool = False):
        self.recipe = recipe
        self.format = fmt
        self.scale = scale
        self.keeps_non_finite = keeps_non_finite
        length = recipe.amax_history_len if recipe.keeps_history else 1
        self.history = torch.zeros(length, scale.numel(), dtype=torch.float32, device=scale.device)
        self.updates = 0
        self._spare: torch.Tensor | None = None

    def update(self, amax: torch.Tensor) -> None:
        """Take the amaxes [columns] of one step; every `interval` updates (the first one too) renew the scales."""
        seen = amax > 0 if self.keeps_non_finite else counts(amax)
        history = torch.cat([amax.unsqueeze(0), self.history[1:]])
        if self.renews:
            found = amax if self.recipe.amax_compute_algo == "most_recent" else history.amax(dim=0)
            scale = scale_from_amax(found, self.format, margin=self.recipe.margin, previous=self.scale)
            self.scale.copy_(torch.where(seen, scale, self.scale))
        self.updates += 1
        rolled = torch.roll(history, -1, 0)
        rolled[0].zero_()
        self.history.copy_(torch.where(seen, rolled, self.history))

    @property
    def renews(self) -> bool:
        """Whether the next update renews the scales."""
        return self.updates % self.recipe.interval == 0

    @property
    def spare(self) -> torch.Tensor:
        """A buffer of the history's shape, for a kernel that updates it: rows move while others are read."""
        if self._spare is None:
            with torch.inference_mode(False):  # it will be the history, and is written in training too
                self._spare = torch.empty_like(self.history)
        return self._spare

    def take_spare(self) -> None:
        """What the kernel left in `spare` is the history now."""
        self.history, self._spare = self.spare, self.history
        self.updates += 1


def counts(amax: torch.Tensor) -> torch.Tensor:
    """Which amaxes [columns] say something about the range of their tensor: bool."""
    return (amax > 0) & torch.isfinite(amax)
