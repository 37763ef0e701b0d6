"""FP8 state of one layer, kept between calls; and the `Call` that one forward gets.

It holds no parameter and no buffer, so a module's state_dict, its `parameters()` and DeepSpeed's view of it stay
those of the unmodified layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..formats import Format
from ..kernels import dequantize
from ..numerics.gemm_blocks import dequantize_128x128
from ..recipe import RECIPES, HighPrecision, Recipe
from .anchors import make_anchor
from .forward_scope import ForwardScope
from .operands import CachedWeight
from .scales import Scales

if TYPE_CHECKING:
    from .fp8_state import ModelFp8State
    from .ran import Ran
    from .recipes import Scaling

ALL_HIGH = HighPrecision(True, True, True)


class QuantizedWeight(NamedTuple):
    """A weight that its owner has cast (O3), ready for the products; the weights of stacked experts, each by itself.

    data       [N, K] float8, or [experts, ., .] as the Parameter lies, in the recipe's forward format
    scale_inv  0-d fp32, or [ceil(N/128), ceil(K/128)] under the block recipe; with experts as first axis where `data`
               has one
    """

    data: torch.Tensor
    scale_inv: torch.Tensor

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Decoded to `dtype`, new memory, dense."""
        if self.data.dim() == 3:
            out = torch.empty(self.data.shape, dtype=dtype, device=self.data.device)
            for expert, (data, scale_inv) in enumerate(zip(self.data, self.scale_inv, strict=True)):
                out[expert] = QuantizedWeight(data, scale_inv).values(dtype)
            return out
        decode = dequantize_128x128 if self.scale_inv.dim() == 2 else dequantize
        return decode(self.data.contiguous(), self.scale_inv, dtype)

    def t(self) -> QuantizedWeight:
        """The transposed matrix, as views."""
        return QuantizedWeight(self.data.t(), self.scale_inv.t() if self.scale_inv.dim() == 2 else self.scale_inv)


class LayerFp8State:
    """State of one FP8 layer.

    index                position in the FP8 state
    quantized_weight     quantized values set from outside (O3); the layer then never reads its weight
    quantized_weight_of  the Parameter that it was made of
    history_of           weak reference to the Parameter whose amaxes the weight's history holds; set by its first cast
    staged_weight_amax   amax of those quantized values, recorded at the layer's next recording call
    is_shared            engines that know nothing of each other may step the weight, so that its quantized values are
                         never kept
    ran                  what the layer's products did in the first step, while that lasts (`ran.py`)
    cached               the quantized weight for the rest of the optimizer step (`weight_cache`); see
                         `operands.cast_weight`
    ready                the same as the GPU's products read them (cuda_products)
    wrapped              `quantized_weight` as Transformer Engine's tensor, with its transpose (`weight_cache`)
    observe              called by a compiled layer's operators with (role, operand) while telemetry looks; eager layers
                         have hooks for that, which a compiled graph does not call
    recipe_number, runs_in_eval, carries_input, carries_weight
                        what a compiled forward needs to know of the recipe when it is traced: constants (compiled)
    trains_in_eval      the FP8 state's, for a compiled forward: traced anew when it changes
    anchor              tensor by whose address a compiled forward finds this layer's state (anchors)
    transposed          the Parameter lies as [K, N]: what the products read is a view of it (`matrix_layer`)
    fast_step           what the rows of an input must be a multiple of for the GPU's fast path, 0 for never
                        (cuda_products)
    """

    def __init__(self, fp8_state: ModelFp8State, index: int, fqn: str):
        self.fp8_state = fp8_state
        self.index = index
        self.fqn = fqn
        self.input_column = 2 * index
        self.weight_column = 2 * index + 1
        self.grad_output_column = 2 * len(fp8_state.names) + index
        high = fp8_state.recipe.override_linear_precision
        self.recipe_number = RECIPES.index(fp8_state.recipe.kind)
        self.runs_in_eval = fp8_state.plan.eval
        self.trains_in_eval = False
        self.carries_input = fp8_state.plan.start_step == 0 and not high.wgrad
        self.carries_weight = fp8_state.plan.start_step == 0 and not high.dgrad and fp8_state.scaling.carries_weight
        self.quantized_weight: QuantizedWeight | None = None
        self.quantized_weight_of: Any = None
        self.history_of: weakref.ref[torch.nn.Parameter] | None = None
        self.staged_weight_amax: torch.Tensor | None = None
        self.fast_step: int | None = None
        self.transposed = False
        self.is_shared = False
        self.ran: Ran | None = None
        self.observe: Callable[[str, torch.Tensor], None] | None = None
        self.anchor: torch.Tensor | None = None
        self._anchors: list[torch.Tensor] = []
        self.forget_weight()

    def note_forward(self, high: HighPrecision, *, dgrad: bool, wgrad: bool) -> None:
        """A forward has multiplied, and its backward will be asked for these products."""
        if self.ran is not None:
            self.ran.forward(high, dgrad=dgrad, wgrad=wgrad)

    def note_backward(self, high: HighPrecision, *, dgrad: bool, wgrad: bool) -> None:
        if self.ran is not None:
            self.ran.backward(high, dgrad=dgrad, wgrad=wgrad)

    def note_call(self, *, special: bool = False) -> None:
        """The layer computed in high precision: in eval mode, or because the call is a `special` one."""
        if self.ran is not None:
            self.ran.called = True
            self.ran.special |= special

    def forget_weight(self) -> None:
        """Drop quantized values that this layer made itself."""
        self.cached: CachedWeight | None = None
        self.ready: Any = None
        self.wrapped: Any = None

    def settle(self, device: torch.device) -> None:
        """The layer is on `device` now."""
        if self.anchor is None or self.anchor.device != device:
            self._name_anew(device)

    def renew_anchor(self) -> None:
        """What the layer does from now on is not what a CUDA graph of it has recorded."""
        if self.anchor is not None:
            self._name_anew(self.anchor.device)

    def _name_anew(self, device: torch.device) -> None:
        self.anchor = make_anchor(self, device)
        self._anchors.append(self.anchor)  # an address must not come back: whatever lies there names this layer

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as part of the copied FP8 state."""
        return _layer_state_of, (self.fp8_state, self.fqn, None if self.anchor is None else str(self.anchor.device))


def _layer_state_of(fp8_state: ModelFp8State, fqn: str, device: str | None) -> LayerFp8State:
    layer_state = fp8_state.layer_state(fqn)
    if device is not None:
        layer_state.settle(torch.device(device))
    return layer_state


@dataclass(eq=False, slots=True)
class Call:
    """One forward of one layer, and its backward.

    scales   what to cast with; None unless the scaling is delayed
    records  amaxes count: in training, where gradients are recorded
    warming  before `start_step`: compute in high precision, record all the same
    scope    the pass it belongs to, in a model without an engine
    foreign  the weight is another one than the quantized values set from outside stand for (functional_call, pruning,
             parametrizations)
    """

    layer_state: LayerFp8State
    scales: Scales | None = None
    records: bool = False
    warming: bool = False
    scope: ForwardScope | None = None
    foreign: bool = False

    @property
    def recipe(self) -> Recipe:
        return self.layer_state.fp8_state.recipe

    @property
    def scaling(self) -> Scaling:
        return self.layer_state.fp8_state.scaling

    @property
    def quantized_weight(self) -> QuantizedWeight | None:
        """Quantized values set from outside, where they are those of this call's weight."""
        return None if self.foreign else self.layer_state.quantized_weight

    def may_cache(self, weight: torch.Tensor) -> bool:
        """Whether quantized values of `weight` may serve later forwards of this optimizer step: `weight_cache` asks for
        it, and nothing but this engine's optimizer writes the weight, as far as anybody can tell.

        Everything else is cast in every forward: frozen weights, which a momentum branch may write at any time; weights
        that are given to `torch.func.functional_call`; any weight in evaluation or under no_grad, where averaged
        weights are swapped in; one that ZeRO-3 gathers for the length of its layer; and every weight of a model without
        an engine.
        """
        return self.records and may_keep(weight, self.layer_state)

    @property
    def high(self) -> HighPrecision:
        """The products that run in high precision in this call."""
        return ALL_HIGH if self.warming else self.recipe.override_linear_precision

    def knows(self, column: int) -> bool:
        """Whether the scale of a column stands before its tensor is seen (delayed scaling)."""
        assert self.scales is not None, "only delayed scaling knows a scale before the tensor"
        return column not in self.scales.unknown

    def knows_operands(self) -> bool:
        """Whether input and weight can be cast in one pass; true under every recipe that keeps no history."""
        if self.scales is None or not self.scales.unknown:
            return True
        layer_state = self.layer_state
        return self.knows(layer_state.input_column) and (
            layer_state.quantized_weight is not None or self.knows(layer_state.weight_column)
        )

    def scale(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, scale_inv), 0-d fp32, of this step."""
        assert self.scales is not None, "only delayed scaling knows a scale before the tensor"
        return self.scales.scale[column], self.scales.scale_inv[column]

    def record(self, column: int, amax: torch.Tensor) -> None:
        self.layer_state.fp8_state.record(column, amax)

    def raised(self, column: int) -> torch.Tensor | None:
        """The FP8 state's pending amaxes, whose entry `column` a kernel itself raises; None where it does not count."""
        if not self.records:
            return None
        return self.layer_state.fp8_state.raised()

    def in_backward(self) -> None:
        """The backward of this call has begun."""
        if self.scope is not None:
            self.scope.saw_backward = True

    def format_of(self, column: int) -> Format:
        fp8_state = self.layer_state.fp8_state
        return fp8_state.backward_format if column == self.layer_state.grad_output_column else fp8_state.forward_format


def may_keep(weight: torch.Tensor, layer_state: Any) -> bool:
    """Whether nothing but the engine's optimizer writes `weight`, and `weight_cache` asks to make use of it; see
    `Call.may_cache`.

    layer_state  a LayerFp8State, or the state of experts
    """
    fp8_state = layer_state.fp8_state
    return (
        fp8_state.plan.weight_cache
        and id(weight) in fp8_state.optimized
        and weight.requires_grad
        and not layer_state.is_shared
        and not hasattr(weight, "ds_id")  # `operands.is_sharded`
    )
