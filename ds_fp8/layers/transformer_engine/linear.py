"""te.Linear in the place of nn.Linear: the same Parameters, our scales, and an autocast of its own in every call.

Three habits of Transformer Engine do not fit a plug-in, and are turned here:

1. *Ambient autocast.* FP8 is on inside `te.autocast`, which a script would open around the model. A plug-in cannot, and
   recompute in activation checkpointing or `engine.module(x)` would be outside of it. So each call opens its own.
2. *The global update.* On leaving the outermost autocast TE rolls the histories of **all** layers that ever ran, and in
   the backward the first layer of each autocast does it again: with one autocast per layer, N times a step. A layer
   takes part when it has no entry under `buffer_key` in `fp8_meta`; ours have one from the start, so TE's buffers stay
   empty.
3. *State.* Instead the quantizers read their scale from, and leave their amax in, slots of the FP8 state, which updates
   all layers of all backends at once, with the group that it was given. TE's casts raise the slot to a running maximum
   (seen on an H200 with 2.20.2), so several calls in a step, and a recompute, count once.

A call that must not record (eval, no_grad) gets a scratch slot for the amax. Tokens are padded to a multiple of 16 with
zeros, which change no amax, output or gradient of the others. Without FP8 a call is `F.linear`, bit for bit nn.Linear.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import BackendError
from ...recipe import HighPrecision
from ..fp8_linear import as_read
from ..ordinary import is_ordinary
from ..ran import note_by_hook
from .initialisers import set_initialisers
from .names import TransformerEngine, load
from .products import attach
from .quantized_weight import TakesQuantizedWeight, weight_of
from .serial import serial

if TYPE_CHECKING:
    from ..layer_state import QuantizedWeight

TOKEN_MULTIPLE = 16
"""FP8 GEMMs on Hopper take operands of multiples of 16 only; 8 or 24 tokens pass the forward and fail in the
backward.
"""

ROLES = (("scaling_fwd", 0, "input"), ("scaling_fwd", 1, "weight"), ("scaling_bwd", 0, "grad_output"))
"""Where te.Linear keeps the quantizer of each operand; its output and grad_input stay in high precision."""


class TELayerState(Protocol):
    """What a layer asks of whoever keeps its FP8 state."""

    high: HighPrecision
    scaling: Any
    kind: str
    kept_quantized: Any

    def is_active(self, training: bool) -> bool:
        """FP8 in this call: `start_step` is reached, and it is training or `eval` is on."""

    def begin(self, input: Callable[[], torch.Tensor]) -> bool:
        """Start a call; whether its tensors record their amaxes. `input` makes what the product reads."""

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """What the layer returns for `output`: a tensor that callers may write into."""

    def scale(self, role: str) -> torch.Tensor | None:
        """fp32 [1] on the layer's device; None when the recipe keeps no scales."""

    def amax(self, role: str) -> torch.Tensor:
        """fp32 [1]: the slot that the cast raises."""

    def scratch(self) -> torch.Tensor:
        """fp32 [1] that nobody reads."""

    def observe(self, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Before `start_step`: record the amaxes of a call in high precision; returns `output`."""

    def microbatch(self) -> bool | None:
        """True: quantize the weight and keep its quantized values; False: the kept ones are good; None: do not keep
        any.
        """

    def quantized(self) -> QuantizedWeight | None:
        """The quantized weight if somebody else made it (O3); records its amax if this call records."""


@functools.cache
def linear_class() -> type[nn.Module]:
    """Our subclass of the installed te.Linear; made on first use, because Transformer Engine is optional."""
    engine = load()

    class TELinear(TakesQuantizedWeight, engine.pytorch.Linear):  # type: ignore[name-defined,misc]
        """nn.Linear in FP8 by Transformer Engine; its FP8 state is not in `state_dict`."""

        # nn.Module saves `_extra_state` when a class overrides these; TE's is pickled, and refused on load since 2.16.
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        @serial
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            state: TELayerState = self.__dict__["te_state"]
            bias = self.bias if self.use_bias else None
            active = state.is_active(self.training)
            special = active and not is_ordinary(input, self.weight, bias)
            if special or not active or input.numel() == 0:
                note_call(self, special=special)
                return state.observe(input, F.linear(input, as_read(self.weight), bias))
            tokens = input.numel() // self.in_features
            short = -tokens % TOKEN_MULTIPLE
            operand = F.pad(input.reshape(tokens, self.in_features), (0, 0, 0, short)) if short else input
            records = state.begin(lambda: input)
            operand = operand.detach() if state.high.dgrad else operand
            with engine.autocast(state.scaling):
                bind_slots(self, engine, state, records)
                output = self._multiply(operand, state)
            note_products(self, output, input, state.high)
            output = state.finish(output)
            if short:
                output = unpadded(output, tokens, input.shape)
            return attach(output, input, self.weight, bias, state.high) if any(state.high) else output

        def _multiply(self, operand: torch.Tensor, state: TELayerState) -> torch.Tensor:
            """The FP8 products; wgrad is left out by a weight that asks for no gradient while TE looks at it."""
            hides = state.high.wgrad and self.weight.requires_grad
            with weight_of(self, engine, state) as microbatch:
                if not hides:
                    return super().forward(operand, is_first_microbatch=microbatch)
                self.weight.requires_grad_(False)
                try:
                    return super().forward(operand, is_first_microbatch=microbatch)
                finally:
                    self.weight.requires_grad_(True)

        def extra_repr(self) -> str:
            return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.use_bias}, fp8=te"

    TELinear.__module__, TELinear.__qualname__ = __name__, "TELinear"
    return TELinear


def note_call(layer: Any, *, special: bool) -> None:
    """See `LayerFp8State.note_call`."""
    layer_state = vars(layer).get("layer_state")
    if layer_state is not None:
        layer_state.note_call(special=special)


def note_products(layer: Any, output: torch.Tensor, input: torch.Tensor, high: HighPrecision) -> None:
    """While the first step is watched: that Transformer Engine multiplied, and by a hook that it does so backward."""
    ran = getattr(vars(layer).get("layer_state"), "ran", None)
    if ran is not None:
        note_by_hook(ran, output, high, input, layer.weight)


def bind_slots(layer: Any, engine: TransformerEngine, state: TELayerState, records: bool) -> None:
    """Put the FP8 state's scale and amax slots into the layer's quantizers; call inside autocast.

    Raises BackendError when the layer has no quantizer where we expect one: an unknown Transformer Engine.
    """
    layer.fp8_meta.setdefault(engine.buffer_key, [])
    if state.scale("input") is None:
        return
    layer.init_fp8_metadata(num_gemms=1)
    for direction, index, role in ROLES:
        try:
            quantizer = layer.quantizers[direction][index]
        except (KeyError, IndexError) as error:
            raise BackendError(
                f"Transformer Engine {engine.version}: te.Linear has no quantizer {direction}[{index}] ({role}).\n"
                "  Set fp8/backend to torch."
            ) from error
        if direction == "scaling_bwd":
            # The backward reads it later, and a pipeline has several forwards in flight: each keeps its own.
            quantizer = layer.quantizers[direction][index] = quantizer.copy()
        quantizer.scale = state.scale(role)
        quantizer.amax = state.amax(role) if records else state.scratch()


def unpadded(output: torch.Tensor, tokens: int, shape: torch.Size) -> torch.Tensor:
    """The first `tokens` rows, with the leading axes of `shape`; no view, so that callers may write into it."""
    return torch.ops.aten._unsafe_view.default(output[:tokens], (*shape[:-1], output.shape[-1]))


def make_linear(source: nn.Linear, state: TELayerState) -> nn.Module:
    """A TELinear with the very Parameters of `source` (which may be empty, under zero.Init), mode and device."""
    weight, bias = source._parameters["weight"], source._parameters["bias"]
    assert weight is not None
    layer = linear_class()(
        source.in_features, source.out_features, bias=bias is not None, params_dtype=weight.dtype, device="meta"
    )
    set_initialisers(layer)
    # Into the dictionary, not by attribute: TE's register_parameter wants an initialiser for each.
    layer._parameters["weight"] = weight
    if bias is not None:
        layer._parameters["bias"] = bias
    else:
        layer.__dict__["bias"] = torch.empty(0, dtype=weight.dtype, device=weight.device)
    layer.__dict__["te_state"] = state
    return layer.train(source.training)


def restore_linear(layer: Any) -> nn.Linear:
    """The unmodified nn.Linear again, with the same Parameters."""
    unmodified = nn.Linear(layer.in_features, layer.out_features, bias=layer.use_bias, device="meta")
    unmodified._parameters["weight"] = layer._parameters["weight"]
    if layer.use_bias:
        unmodified._parameters["bias"] = layer._parameters["bias"]
    return unmodified.train(layer.training)


def __getattr__(name: str) -> Any:
    """`TELinear` by name, for copy and pickle, without importing Transformer Engine before it is wanted."""
    if name == "TELinear":
        return linear_class()
    raise AttributeError(name)
