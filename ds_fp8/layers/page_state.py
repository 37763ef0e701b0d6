"""A page as Transformer Engine's layers read it: one-element slots that its quantisers look at and write into.

Our own layers ask for a `Call` and record amaxes by calling; a te.Linear instead holds tensors: it reads `scale`, and
raises `amax` to a running maximum. So the slots are views into the scales of this step and the book's pending amaxes.
A tensor without history has no scale yet: it is measured before Transformer Engine casts it, the gradient by a hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..kernels import amax as amax_of
from ..recipe import HighPrecision
from .operands import CachedWeight
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
        self._own: dict[str, torch.Tensor] = {}

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
        return not book.warming and (training or book.plan.eval)

    def begin(self, input: Callable[[], torch.Tensor]) -> bool:
        """Start a call; whether its tensors record their amaxes. `input` makes what the product reads, if it is asked for."""
        call = self._call = self.page.book.call(self.page, training=self._training, device=self.weight.device)
        self._own = {}
        if call is None or call.scales is None:
            return False
        for role, tensor in (("input", input), ("weight", lambda: self.weight)):
            if not call.knows(self._column(role)):
                self._own[role] = self._scale_of(role, tensor().detach())
        if not call.knows(self.page.grad_output_column):
            self._own["grad_output"] = call.scale(self.page.grad_output_column)[0].reshape(1).clone()
        return call.records

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """What the layer returns: `output`, as a tensor that callers may write into, with our hook behind it."""
        call, own = self._call, self._own.get("grad_output")
        if call is not None and output.requires_grad and (own is not None or call.scope is not None):

            def before_backward(gradient: torch.Tensor) -> None:
                call.in_backward()
                if own is not None:
                    own.copy_(self._scale_of("grad_output", gradient, call))

            output.register_hook(before_backward)
        return torch.ops.aten._unsafe_view.default(output, output.shape)

    def observe(self, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Before `start_step`: record the amaxes of a call in high precision; returns `output`."""
        call = self.page.book.call(self.page, training=self._training, device=self.weight.device)
        if call is None or not call.warming or not call.records:
            return output
        call.record(self.page.input_column, amax_of(input))
        call.record(self.page.weight_column, amax_of(self.weight.detach()))
        if not output.requires_grad:
            return output

        def before_backward(gradient: torch.Tensor) -> None:
            call.in_backward()
            call.record(self.page.grad_output_column, amax_of(gradient))

        output.register_hook(before_backward)
        return torch.ops.aten._unsafe_view.default(output, output.shape)  # may be written into

    def scale(self, role: str) -> torch.Tensor | None:
        """fp32 [1], of this step; None when the recipe keeps no scales."""
        if self._call is None or self._call.scales is None:
            return None
        own = self._own.get(role)
        return self._call.scales.scale[self._column(role)].reshape(1) if own is None else own

    def amax(self, role: str) -> torch.Tensor:
        """fp32 [1]: the pending amax, to be raised in place."""
        return self.page.book.slot(self._column(role))

    def scratch(self) -> torch.Tensor:
        """fp32 [1] that nobody reads."""
        return torch.zeros(1, dtype=torch.float32, device=self.weight.device)

    def microbatch(self) -> bool | None:
        """True: quantise the weight and keep its codes; False: the kept ones are good; None: do not keep any."""
        page, weight = self.page, self.weight
        if self._call is None or not self._call.may_cache(weight):
            return None
        fresh = page.cached is None or not page.cached.is_of(weight)
        page.cached = CachedWeight(weight, weight._version, weight.data_ptr(), None)  # the codes are the layer's own
        return fresh

    def codes(self) -> WeightCodes | None:
        """The weight's codes if somebody else made them (O3); their amax counts once, as in `cast_weight`."""
        page, call = self.page, self._call
        if page.weight_codes is not None and page.staged_weight_amax is not None and call is not None and call.records:
            call.record(page.weight_column, page.staged_weight_amax)
            page.staged_weight_amax = None
        return page.weight_codes

    @property
    def kept_codes(self) -> Any:
        """The codes as Transformer Engine's tensor, from an earlier call of this step."""
        return self.page.wrapped

    @kept_codes.setter
    def kept_codes(self, quantized: Any) -> None:
        # Codes from outside do not change within a step. Not in inference mode: a backward cannot use what that made.
        if self._call is not None and self._call.may_cache(self.weight):
            self.page.wrapped = quantized

    def _scale_of(self, role: str, tensor: torch.Tensor, call: Call | None = None) -> torch.Tensor:
        """fp32 [1]: the scale of a tensor without history."""
        call = self._call if call is None else call
        assert call is not None and call.scales is not None, "only delayed scaling has scales"
        column = self._column(role)
        return call.scales.of_tensor(column, amax_of(tensor), call.format_of(column)).reshape(1)

    def _column(self, role: str) -> int:
        return getattr(self.page, f"{role}_column")
