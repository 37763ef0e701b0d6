"""A page as Transformer Engine's layers read it: one-element slots that its quantisers look at and write into.

Our own layers ask for a `Call` and record amaxes by calling; a te.Linear instead holds tensors: it reads `scale`, and
raises `amax` to a running maximum. So the slots are views into the region's scales and the book's pending amaxes.
"""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import amax as amax_of
from ..recipe import HighPrecision
from .operands import is_sharded
from .page import Call, Page, WeightCodes


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
        self._quantized: tuple[int, ...] | None = None
        self._records = False
        self._weight_scale: torch.Tensor | None = None

    @property
    def high(self) -> HighPrecision:
        return self.page.book.recipe.override_linear_precision

    @property
    def kind(self) -> str:
        return self.page.book.recipe.kind

    def is_active(self, training: bool) -> bool:
        """FP8 in this call: `start_step` is reached, and it is training or `eval` is on."""
        book = self.page.book
        self._training = training
        return book.steps >= book.plan.start_step and (training or book.plan.eval)

    def begin(self) -> bool:
        """Enter the region of this call; whether its input and weight record their amaxes."""
        self._call = self.page.call(training=self._training, device=self.weight.device)
        call = self._call
        self._records = call is not None and call.records
        self._weight_scale = self._scale_of_first_cast()
        if call is None or call.region is None:
            return False
        # The casts write into the slots by themselves, in the backward too: the book is told what to expect.
        backward = call.records_gradient and torch.is_grad_enabled()
        self.page.book.expect(call.region, forward=call.records, backward=backward)
        return call.records

    def records_backward(self) -> bool:
        """Whether the amax of grad_output counts: after a recompute too, whose graph may be the one differentiated."""
        return self._call is not None and self._call.records_gradient

    def observe(self, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Before `start_step`: record the amaxes of a call in high precision; returns `output`."""
        call = self.page.call(training=self._training, device=self.weight.device)
        if call is None or not call.warming:
            return output
        if call.records:
            call.record(self.page.input_column, amax_of(input))
            call.record(self.page.weight_column, amax_of(self.weight.detach()))
        if output.requires_grad and call.records_gradient:
            output.register_hook(lambda gradient: call.record(self.page.grad_output_column, amax_of(gradient)))
        return output

    def scale(self, role: str) -> torch.Tensor | None:
        """fp32 [1], frozen for the region; None when the recipe keeps no scales."""
        if self._call is None or self._call.region is None:
            return None
        if role == "weight" and self._weight_scale is not None:
            return self._weight_scale.reshape(1)
        return self._call.region.scale[self._column(role)].reshape(1)

    def amax(self, role: str) -> torch.Tensor:
        """fp32 [1]: the pending amax, to be raised in place."""
        if role == "weight" and self._weight_scale is not None:
            return self.scratch()
        return self.page.book.slot(self._column(role))

    def scratch(self) -> torch.Tensor:
        """fp32 [1] that nobody reads."""
        return torch.zeros(1, dtype=torch.float32, device=self.weight.device)

    def microbatch(self) -> bool | None:
        """True: quantise the weight and keep its codes; False: the kept ones are good; None: do not keep any."""
        book = self.page.book
        if not book.plan.weight_cache or self.page.is_shared or is_sharded(self.weight):
            return None
        key = (book.weights_version, self.weight._version, self.weight.data_ptr())
        fresh = self._quantized != key
        if self._records or not book.recipe.is_delayed:
            # A forward that does not record (eval) must not rob the next one of recording this weight's amax.
            self._quantized = key
        return fresh

    def codes(self) -> WeightCodes | None:
        """The weight's codes if somebody else made them (O3); their amax counts once, as in `cast_weight`."""
        page = self.page
        if page.weight_codes is not None and self._records and page.staged_weight_amax is not None:
            assert self._call is not None, "only a call records"
            self._call.record(page.weight_column, page.staged_weight_amax)
            page.staged_weight_amax = None
        return page.weight_codes

    @property
    def kept_codes(self) -> Any:
        """The codes as Transformer Engine's tensor, from an earlier call of this step."""
        return self.page.cached_weight

    @kept_codes.setter
    def kept_codes(self, quantized: Any) -> None:
        # As in `cast_weight`: a sharded weight's codes go with it; a backward cannot use what inference mode made.
        if self.page.book.plan.weight_cache and not is_sharded(self.weight) and not torch.is_inference_mode_enabled():
            self.page.cached_weight = quantized

    def forget_weight(self) -> None:
        """The layer's own cache was emptied."""
        self._quantized = None

    def _scale_of_first_cast(self) -> torch.Tensor | None:
        """The scale with which a sharded weight was cast before in this optimizer step; None the first time.

        Transformer Engine cannot keep a sharded weight's codes. As in `cast_weight` they are made again with the same
        scale, and their amax counts once: what a weight is multiplied as does not change within a step.
        """
        call, page = self._call, self.page
        if call is None or call.region is None or not call.caches_weight or not is_sharded(self.weight):
            return None
        key = (page.book.weights_version,)
        if page.cached_key == key and page.cached_scale is not None:
            return page.cached_scale[0]
        if call.records:
            page.cached_key, page.cached_scale = key, call.scale(page.weight_column)
        return None

    def _column(self, role: str) -> int:
        return getattr(self.page, f"{role}_column")
