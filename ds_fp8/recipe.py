"""The scaling recipe: how the factors that bring a tensor into FP8's range are found.

Three families. *delayed*: the scale comes from the amaxes of earlier steps, so one pass casts and measures.
*current*: from this tensor's own amax, two passes, no history. *block*: one current scale for each 1x128 group of an
activation and each 128x128 tile of a weight. mxfp8 and nvfp4 are Blackwell's and live in Transformer Engine only.

The meanings are Transformer Engine's: scale = (format.max / amax) / 2**margin, and

    fprop   output      [M, N] = input       [M, K] @ weight.T [K, N]     e4m3 x e4m3
    dgrad   grad_input  [M, K] = grad_output [M, N] @ weight   [N, K]     e5m2 x e4m3   (HYBRID; e4m3 x e4m3 with E4M3)
    wgrad   grad_weight [N, K] = grad_output.T [N, M] @ input  [M, K]     e5m2 x e4m3   (HYBRID)

Source: Transformer Engine's user guide, FP8 recipes; arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .formats import E4M3, E5M2, Format

RECIPES = ("delayed", "current", "block", "mxfp8", "nvfp4")
FP8_FORMATS = ("E4M3", "HYBRID")
AMAX_ALGORITHMS = ("max", "most_recent")
AMAX_RULES = ("ds_fp8", "transformer_engine")


class HighPrecision(NamedTuple):
    """Which of the three products run in high precision; Transformer Engine's `override_linear_precision`."""

    fprop: bool = False
    dgrad: bool = False
    wgrad: bool = False


@dataclass(frozen=True)
class Recipe:
    """One recipe for the whole model.

    kind                       one of RECIPES
    fp8_format                 `E4M3` for all operands, or `HYBRID`: E5M2 for grad_output
    margin                     powers of two of headroom below format.max (delayed)
    interval                   optimizer steps between two recomputations of the scales (delayed)
    amax_history_len           optimizer steps remembered (delayed)
    amax_compute_algo          `max` of the history or the `most_recent` entry (delayed)
    amax_rules                 what a tensor without history is cast with, and what a non-finite amax does (delayed):
                               `ds_fp8`: its own amax; nothing. `transformer_engine`: scale 1; it stays in the history.
                               `auto`: ds_fp8 under an engine, transformer_engine for a layer by itself
    override_linear_precision  products kept in high precision
    reduce_amax                amax is MAX-reduced over the data-parallel group (delayed; current and block scale
                               each rank's own tensor, as Transformer Engine does)
    """

    kind: str = "delayed"
    fp8_format: str = "HYBRID"
    margin: int = 0
    interval: int = 1
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    amax_rules: str = "auto"
    override_linear_precision: HighPrecision = HighPrecision()
    reduce_amax: bool = True

    @property
    def forward_format(self) -> Format:
        """Format of input and weight."""
        return E4M3

    @property
    def backward_format(self) -> Format:
        """Format of grad_output."""
        return E5M2 if self.fp8_format == "HYBRID" else E4M3

    @property
    def is_delayed(self) -> bool:
        return self.kind == "delayed"

    def __str__(self) -> str:
        if not self.is_delayed:
            return f"{self.fp8_format}, {self.kind}"
        return f"{self.fp8_format}, delayed, history {self.amax_history_len} ({self.amax_compute_algo}), margin {self.margin}"
