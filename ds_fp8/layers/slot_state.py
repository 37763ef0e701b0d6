"""A layer's FP8 state as Transformer Engine's layers read it: one-element slots that its quantizers look at and write
into.

Our own layers ask for a `Call` and record amaxes by calling; a te.Linear instead holds tensors: it reads `scale`, and
raises `amax` to a running maximum. So the slots are views into the scales of this step and the FP8 state's pending
amaxes. A tensor without history has no scale yet: it is measured before Transformer Engine casts it, the gradient by a
hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import LayerError
from ..kernels import amax as amax_of
from ..recipe import HighPrecision
from .layer_state import Call, LayerFp8State, QuantizedWeight
from .operands import CachedWeight
from .products import refuse_second_derivative


class SlotState:
    """The FP8 state of one Transformer Engine layer (see `TELayerState` in `transformer_engine/linear.py`).

    weight   the layer's Parameter: tells the device, and whether it changed
    scaling  Transformer Engine's recipe object
    """

    def __init__(self, layer_state: LayerFp8State, weight: torch.Tensor, scaling: Any):
        self.layer_state = layer_state
        self.weight = weight
        self.scaling = scaling
        self._call: Call | None = None
        self._training = True
        self._own: dict[str, torch.Tensor] = {}

    @property
    def high(self) -> HighPrecision:
        return self.layer_state.fp8_state.recipe.override_linear_precision

    @property
    def kind(self) -> str:
        return self.layer_state.fp8_state.recipe.kind

    def is_active(self, training: bool) -> bool:
        """FP8 in this call: `start_step` is reached, and it is training or `eval` is on."""
        fp8_state = self.layer_state.fp8_state
        self._training = fp8_state.is_training(training)
        return not fp8_state.warming and (self._training or fp8_state.plan.eval)

    def begin(self, input: Callable[[], torch.Tensor]) -> bool:
        """Start a call; whether its tensors record their amaxes. `input` makes what the product reads, if it is asked
        for.
        """
        call = self._call = self.layer_state.fp8_state.call(
            self.layer_state, training=self._training, device=self.weight.device
        )
        self._own = {}
        if call is None or call.scales is None:
            return False
        for role, tensor in (("input", input), ("weight", lambda: self.weight)):
            if not call.knows(self._column(role)):
                self._own[role] = self._scale_of(role, tensor().detach())
            elif role == "weight" and self._casts_weight(call):
                self._own[role] = call.scaling.weight_scale(self.weight.detach(), call)
        if not call.knows(self.layer_state.grad_output_column):
            self._own["grad_output"] = call.scale(self.layer_state.grad_output_column)[0].reshape(1).clone()
        return call.records

    def _casts_weight(self, call: Call) -> bool:
        """Whether this call casts the weight, and by our rules: a script may have made it larger than its scale can
        take.
        """
        layer_state = self.layer_state
        if layer_state.quantized_weight is not None or layer_state.fp8_state.exact:
            return False
        kept = layer_state.cached
        return kept is None or not (call.may_cache(self.weight) and kept.is_of(self.weight))

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """What the layer returns: `output`, as a tensor that callers may write into, with our hook behind it."""
        call, own = self._call, self._own.get("grad_output")
        if call is not None and output.requires_grad:
            weight = self.weight
            passed: list[bool] = []

            def before_backward(gradient: torch.Tensor) -> None:
                if passed and weight.requires_grad:
                    raise LayerError(
                        f"{call.layer_state.fqn}: a second backward through one forward (retain_graph=True), but "
                        "Transformer Engine frees in the first what it had kept.\n"
                        "  Add the losses and call backward once, or set fp8/backend to torch."
                    )
                passed.append(True)
                # Transformer Engine's backward would leave it out, and not say so.
                refuse_second_derivative(call.layer_state)
                call.in_backward()
                if own is not None:
                    own.copy_(self._scale_of("grad_output", gradient, call))

            output.register_hook(before_backward)
        return torch.ops.aten._unsafe_view.default(output, output.shape)

    def observe(self, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Before `start_step`: record the amaxes of a call in high precision; returns `output`."""
        call = self.layer_state.fp8_state.call(self.layer_state, training=self._training, device=self.weight.device)
        if call is None or not call.warming or not call.records:
            return output
        call.record(self.layer_state.input_column, amax_of(input))
        call.record(self.layer_state.weight_column, amax_of(self.weight.detach()))
        if not output.requires_grad:
            return output

        def before_backward(gradient: torch.Tensor) -> None:
            call.in_backward()
            call.record(self.layer_state.grad_output_column, amax_of(gradient))

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
        return self.layer_state.fp8_state.slot(self._column(role))

    def scratch(self) -> torch.Tensor:
        """fp32 [1] that nobody reads."""
        return torch.zeros(1, dtype=torch.float32, device=self.weight.device)

    def microbatch(self) -> bool | None:
        """True: quantize the weight and keep its quantized values; False: the kept ones are good; None: do not keep
        any.
        """
        layer_state, weight = self.layer_state, self.weight
        if self._call is None or not self._call.may_cache(weight):
            return None
        fresh = layer_state.cached is None or not layer_state.cached.is_of(weight)
        # None: the quantized values are the layer's own.
        layer_state.cached = CachedWeight(weight, weight._version, weight.data_ptr(), None)
        return fresh

    def quantized(self) -> QuantizedWeight | None:
        """The quantized weight if somebody else made it (O3); its amax counts once, as in `cast_weight`."""
        layer_state, call = self.layer_state, self._call
        if (
            layer_state.quantized_weight is not None
            and layer_state.staged_weight_amax is not None
            and call is not None
            and call.records
        ):
            call.record(layer_state.weight_column, layer_state.staged_weight_amax)
            layer_state.staged_weight_amax = None
        return layer_state.quantized_weight

    @property
    def kept_quantized(self) -> Any:
        """The quantized values as Transformer Engine's tensor, from an earlier call of this step."""
        return self.layer_state.wrapped

    @kept_quantized.setter
    def kept_quantized(self, te_tensor: Any) -> None:
        # Quantized values from outside do not change within a step. Not in inference mode: a backward cannot use what
        # that made.
        if self._call is not None and self._call.may_cache(self.weight):
            self.layer_state.wrapped = te_tensor

    def _scale_of(self, role: str, tensor: torch.Tensor, call: Call | None = None) -> torch.Tensor:
        """fp32 [1]: the scale of a tensor without history."""
        call = self._call if call is None else call
        assert call is not None and call.scales is not None, "only delayed scaling has scales"
        column = self._column(role)
        return call.scales.of_tensor(column, amax_of(tensor), call.format_of(column)).reshape(1)

    def _column(self, role: str) -> int:
        return getattr(self.layer_state, f"{role}_column")
