"""A page as Transformer Engine's layers read it: one-element slots that its quantisers look at and write into.

Our own layers ask for a `Call` and record amaxes by calling; a te.Linear instead holds tensors: it reads `scale`, and
raises `amax` to a running maximum. So the slots are views into the region's scales and the book's pending amaxes.
"""

from __future__ import annotations

from typing import Any

import torch

from ..recipe import HighPrecision
from .page import Call, Page


class PageState:
    """The FP8 state of one Transformer Engine layer (see `LayerState` in `transformer_engine/linear.py`).

    weight   the layer's Parameter: tells the device, and whether it changed
    scaling  Transformer Engine's recipe object
    """

    def __init__(self, page: Page, weight: torch.Tensor, scaling: Any):
        self.page = page
        self.weight = weight
        self.scaling = scaling
        self._call: Call | None = None
        self._training = True
        self._quantized_version = -1

    @property
    def high(self) -> HighPrecision:
        return self.page.book.recipe.override_linear_precision

    def is_active(self, training: bool) -> bool:
        """FP8 in this call: `start_step` is reached, and it is training or `eval` is on."""
        book = self.page.book
        self._training = training
        return book.steps >= book.plan.start_step and (training or book.plan.eval)

    def begin(self) -> bool:
        """Enter the region of this call; whether it records its amaxes."""
        self._call = self.page.call(training=self._training, device=self.weight.device)
        call = self._call
        if call is None or call.region is None or not call.records:
            return False
        # The casts write into the slots by themselves, in the backward too: expect both.
        self.page.book.expect(call.region, backward=torch.is_grad_enabled())
        return True

    def scale(self, role: str) -> torch.Tensor | None:
        """fp32 [1], frozen for the region; None when the recipe keeps no scales."""
        if self._call is None or self._call.region is None:
            return None
        return self._call.region.scale[self._column(role)].reshape(1)

    def amax(self, role: str) -> torch.Tensor:
        """fp32 [1]: the pending amax, to be raised in place."""
        return self.page.book.slot(self._column(role))

    def scratch(self) -> torch.Tensor:
        """fp32 [1] that nobody reads."""
        return torch.zeros(1, dtype=torch.float32, device=self.weight.device)

    def microbatch(self) -> bool | None:
        """True: quantise the weight and keep its codes; False: the kept ones are good; None: do not keep any."""
        book = self.page.book
        if not book.plan.weight_cache or hasattr(self.weight, "ds_id"):
            return None
        fresh = self._quantized_version != book.weights_version
        self._quantized_version = book.weights_version
        return fresh

    def _column(self, role: str) -> int:
        return getattr(self.page, f"{role}_column")
