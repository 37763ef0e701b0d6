"""What a recipe says: `Scaling`, whose methods each answer one caller's question.

    reference path      quantize, quantize_transposed, quantize_weight, requantize_weight     (`operands`, `products`)
    GPU                 fast_rows, quantize_on_cuda, quantize_weight_on_cuda                  (`cuda_products`)
    compiled layers     carried_scale_shape                                                   (`compiled_products`)
    O3, frozen          owner_*, frozen_scales, quantize_frozen                               (`zero`)
    Transformer Engine  weight_scale, te_*                                                    (`transformer_engine`)

The defaults are those of a recipe with one scale per tensor. A recipe that is Transformer Engine's alone needs the last
group only; one that has no fast path on a GPU leaves `fast_rows` at 0 and is computed by `products` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ...formats import E4M3, Format
from ...numerics.scaling import scale_from_amax
from .. import grouped_rows
from ..operands import TENSOR, Operand, QuantizedPair

if TYPE_CHECKING:
    from ..layer_state import Call, QuantizedWeight
    from .owner import Segment


class Scaling:
    """One recipe.

    input_extent         what one scale of an input or grad_output covers (`operands`)
    weight_extent        the same of a weight
    transposes           data of an input or grad_output serve both orientations: they are cast once for two products
    weight_transposes    data of a weight serve fprop and dgrad; else dgrad casts the weight again
    carries_weight       a compiled layer carries the transposed data of a weight to its backward; else it casts again
    fast_dtypes          dtypes of inputs that the fast path on a GPU takes
    fast_accumulation    fprop may accumulate in fewer bits on Hopper, as Transformer Engine does
    grouped              module with the products of stacked experts
    te_class             class in transformer_engine.common.recipe; the plan keeps recipes without one to our own layers
    te_probe             function of transformer_engine.pytorch that says whether the device runs it
    te_quantized         module below transformer_engine.pytorch.tensor, class and parameters of a quantized weight
                         (O3); None: no weight may be quantized outside of the layer
    """

    input_extent = TENSOR
    weight_extent = TENSOR
    transposes = True
    weight_transposes = True
    carries_weight = True
    fast_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    fast_accumulation = True
    grouped: ModuleType = grouped_rows
    te_class = ""
    te_probe = "is_fp8_available"
    te_quantized: tuple[str, str, tuple[str, ...]] | None = (
        "float8_tensor",
        "Float8Tensor",
        ("data", "fp8_scale_inv", "fp8_dtype", "data_transpose", "quantizer"),
    )

    # -- reference path ----------------------------------------------------------------------------------------------

    def quantize(self, x: torch.Tensor, call: Call, column: int) -> Operand:
        """An input or grad_output `x` [rows, columns] for a product that sums over its columns.

        With one scale per row (`ROWS`) that of a row that is not finite is NaN, so that an overflow is seen; with other
        extents whoever multiplies sees to it.
        """
        raise NotImplementedError

    def quantize_transposed(self, x: torch.Tensor, call: Call, column: int) -> Operand:
        """[columns, rows] for a product that sums over the rows of `x`, where no data are there to be transposed."""
        return self.quantize(x, call, column).t()

    def quantize_weight(self, weight: torch.Tensor, call: Call) -> Operand:
        """The weight [N, K] for fprop, cast now."""
        return self.requantize_weight(weight, None, call.recipe.forward_format)

    def requantize_weight(
        self, weight: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor] | None, fmt: Format
    ) -> Operand:
        """The data of an earlier cast, made again from a weight that was gathered anew.

        scale  (scale, scale_inv) of that cast where it stood beforehand; else it follows from the tensor
        """
        raise NotImplementedError

    def quantize_weight_transposed(self, weight: torch.Tensor, fmt: Format) -> Operand:
        """The weight as [K, N] for dgrad, where data of [N, K] cannot be transposed (`weight_transposes`)."""
        raise NotImplementedError

    # -- GPU ---------------------------------------------------------------------------------------------------------

    def fast_rows(self, weight: torch.Tensor) -> int:
        """What the rows of an input must be a multiple of for the fast path on a GPU; 0: never with this weight."""
        return 0

    def quantize_on_cuda(
        self,
        library: Any,
        x: torch.Tensor,
        call: Call,
        column: int,
        *,
        straight: bool,
        transposed: bool,
        guarded: bool,
        kept: torch.Tensor | None = None,
    ) -> QuantizedPair:
        """An input or grad_output [..., K] as [M, K], and as [K, M] dense; (None, None) for what is not asked for.

        library  the kernels of the device
        guarded  nothing in high precision shows an overflow of `x`, and a cast saturates infinities: the scale_inv of
                 what is asked for last (transposed, else straight) is NaN then
        kept     0-d fp32 at a multiple of 16 bytes, which gets the scale_inv where there is one; not with `guarded`
        """
        raise NotImplementedError

    def quantize_weight_on_cuda(
        self, library: Any, weight: torch.Tensor, call: Call, *, straight: bool, transposed: bool,
        kept: torch.Tensor | None = None,
    ) -> Operand:  # fmt: skip
        """The weight [N, K], and transposed. Without `straight` that alone, and an amax recorded before is not
        again. `kept` as above.
        """
        raise NotImplementedError

    def quantize_both_on_cuda(
        self, library: Any, x: torch.Tensor, weight: torch.Tensor, call: Call, *, transposed: tuple[bool, bool],
        kept: Sequence[torch.Tensor | None] = (None, None),
    ) -> tuple[QuantizedPair, Operand]:  # fmt: skip
        """`quantize_on_cuda` of an input and `quantize_weight_on_cuda`, in as few launches as there are kernels for.

        transposed, kept  those of the input, and those of the weight
        """
        operand = self.quantize_on_cuda(
            library, x, call, call.layer_state.input_column, straight=True, transposed=transposed[0], guarded=False,
            kept=kept[0],
        )  # fmt: skip
        made = self.quantize_weight_on_cuda(
            library, weight, call, straight=True, transposed=transposed[1], kept=kept[1]
        )
        return operand, made

    # -- compiled layers ---------------------------------------------------------------------------------------------

    def carried_scale_shape(self, k: Any, rows: Any) -> tuple[Any, ...]:
        """Shape of the scale_inv that a compiled layer keeps for its backward, of an input [rows, k]; where a tensor
        has one, those of input and weight at the head of a row each.
        """
        return (2, 4)

    # -- O3 and frozen weights: the owner casts ----------------------------------------------------------------------

    def owner_amaxes(self, shape: tuple[int, int]) -> int:
        """How many amaxes of a weight of this shape travel between its owners."""
        return 1

    def owner_measure(self, segments: Sequence[Segment], owners: Sequence[int], amaxes: torch.Tensor,
                      per_weight: Sequence[torch.Tensor]) -> None:  # fmt: skip
        """MAX the amaxes of what this rank owns into those of the weights.

        owners      for each segment the number of its weight
        amaxes      fp32, those of all weights; `per_weight` are its parts, fp32 [owner_amaxes] each
        """
        raise NotImplementedError

    def owner_scales(
        self, weights: Sequence[Any], amaxes: Sequence[torch.Tensor], fp8_state: Any
    ) -> list[torch.Tensor]:
        """For each weight (`shape`, `layer`) the scales with which its layer would cast, for these amaxes of the whole.

        A recipe with a history has the amax recorded when the layer next uses the weight.
        """
        raise NotImplementedError

    def owner_expert_scales(self, shape: tuple[int, int], amaxes: torch.Tensor) -> torch.Tensor:
        """The same for stacked experts, which keep no history: [experts, ...] for weights of `shape`, `amaxes`
        [experts, owner_amaxes].
        """
        return scale_from_amax(amaxes.view(-1), E4M3)

    def owner_quantize(self, segments: Sequence[Segment], scales: Sequence[torch.Tensor]) -> None:
        """Fill the segments' data; `scales` has for each segment what `owner_scales` gave for its weight."""
        raise NotImplementedError

    def frozen_scales(self, amaxes: torch.Tensor, shape: tuple[int, int], fmt: Format) -> torch.Tensor:
        """Scales, powers of two, of a weight of this shape that is never stepped, for these amaxes of the whole of it
        (fp32 [owner_amaxes]).
        """
        raise NotImplementedError

    def quantize_frozen(self, weight: torch.Tensor, fmt: Format) -> QuantizedWeight:
        """Data of a weight [N, K] that is never stepped, with scales that are powers of two."""
        raise NotImplementedError

    # -- Transformer Engine ------------------------------------------------------------------------------------------

    def weight_scale(self, weight: torch.Tensor, call: Call) -> torch.Tensor:
        """fp32 [1]: the scale with which Transformer Engine is to cast [N, K] now; of a recipe with a history, for a
        weight that has one.
        """
        raise NotImplementedError

    def te_arguments(self, formats: Any, recipe: Any) -> dict[str, Any]:
        """Arguments of `te_class`; `formats` is its enumeration Format."""
        return {"fp8_format": getattr(formats, recipe.fp8_format)}

    def te_quantized_arguments(self, data: torch.Tensor, scale_inv: torch.Tensor, quantizer: Any) -> dict[str, Any]:
        """Arguments of the class in `te_quantized`, beside those that all such classes have."""
        raise NotImplementedError
