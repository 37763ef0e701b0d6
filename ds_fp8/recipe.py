"""The scaling recipe: how the factors that bring a tensor into FP8's range are found.

    delayed       the scale comes from the amaxes of earlier steps, so one pass casts and measures
    current       from this tensor's own amax, two passes, no history
    block         one current scale for each 1x128 group of an activation and each 128x128 tile of a weight
    rowwise       one current scale for each row of an operand, along the axis that a product sums over
    mxfp8, nvfp4  Blackwell's, which live in Transformer Engine only

The meanings are Transformer Engine's: scale = (format.max / amax) / 2**margin, and

    fprop   output      [M, N] = input       [M, K] @ weight.T [K, N]     e4m3 x e4m3
    dgrad   grad_input  [M, K] = grad_output [M, N] @ weight   [N, K]     e5m2 x e4m3   (HYBRID; e4m3 x e4m3 with E4M3)
    wgrad   grad_weight [N, K] = grad_output.T [N, M] @ input  [M, K]     e5m2 x e4m3   (HYBRID)

A recipe is two things: an entry in `RECIPE_KINDS`, which is what the JSON, the plan and telemetry know of it, and a
module of its name in `ds_fp8/layers/recipes`, which casts. Nothing else asks a recipe for its name.
Source: Transformer Engine's user guide, FP8 recipes; arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from .formats import E4M3, E5M2, Format


@dataclass(frozen=True)
class RecipeKind:
    """What is known of a recipe without casting anything.

    scale_extent              what one scale covers: `tensor`, `row`, or `block` (1x128, 128x128 or smaller)
    keeps_history             scales follow the amaxes of earlier steps
    without_history           the recipe in its place where no steps are taken; empty where it takes none
    alignment                 in_features and out_features must be multiples of this
    is_ours                   our own layers compute it; else only Transformer Engine's do
    transformer_engine_since  compute capability that Transformer Engine needs for it; None: it has no such recipe
    multiplied_since          compute capability on which our own layers multiply in FP8; below they emulate it
    not_by_owner              why the owner of a weight cannot make the data that the layer makes (O3, frozen weights)
    experts_scale_extent      what one scale covers in stacked experts: `row` or `block`; None: they are not converted
    """

    scale_extent: str = "tensor"
    keeps_history: bool = False
    without_history: str = ""
    alignment: int = 16
    is_ours: bool = True
    transformer_engine_since: tuple[int, int] | None = (8, 9)
    multiplied_since: tuple[int, int] = (8, 9)
    not_by_owner: str = ""
    experts_scale_extent: str | None = "row"


_BLACKWELL = RecipeKind(
    scale_extent="block",
    is_ours=False,
    transformer_engine_since=(10, 0),
    not_by_owner="only Transformer Engine's layers make its data",
    experts_scale_extent=None,
)

RECIPE_KINDS = {
    "delayed": RecipeKind(keeps_history=True, without_history="current"),
    "current": RecipeKind(),
    "block": RecipeKind(scale_extent="block", transformer_engine_since=(9, 0), experts_scale_extent="block"),
    "rowwise": RecipeKind(
        scale_extent="row",
        transformer_engine_since=None,
        multiplied_since=(9, 0),
        not_by_owner="dgrad reads a weight with scales along the other axis, "
        "for which the layer casts it again from 16 bits",
    ),
    "mxfp8": replace(_BLACKWELL, alignment=32),
    "nvfp4": _BLACKWELL,
}
"""Every recipe by its name in the JSON (`fp8/recipe`)."""

RECIPES = tuple(RECIPE_KINDS)
OUR_RECIPES = tuple(name for name, kind in RECIPE_KINDS.items() if kind.is_ours)
OWNER_RECIPES = tuple(name for name, kind in RECIPE_KINDS.items() if not kind.not_by_owner)
TE_RECIPES = tuple(name for name, kind in RECIPE_KINDS.items() if kind.transformer_engine_since is not None)
HISTORY_RECIPES = tuple(name for name, kind in RECIPE_KINDS.items() if kind.keeps_history)


def listed(names: tuple[str, ...] | list[str], last: str = "or") -> str:
    """`a, b or c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


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
    margin                     powers of two of headroom below format.max (recipes that keep a history)
    interval                   optimizer steps between two recomputations of the scales (the same)
    amax_history_len           optimizer steps remembered (the same)
    amax_compute_algo          `max` of the history or the `most_recent` entry (the same)
    amax_rules                 what a tensor without history is cast with, and what a non-finite amax does (the same):
                               `ds_fp8`: its own amax; nothing. `transformer_engine`: scale 1; it stays in the history.
                               `auto`: ds_fp8 under an engine, transformer_engine for a layer by itself
    override_linear_precision  products kept in high precision
    reduce_amax                amax is MAX-reduced over the data-parallel group (the same; recipes without a history
                               scale each rank's own tensor, as Transformer Engine does)
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
    def facts(self) -> RecipeKind:
        return RECIPE_KINDS[self.kind]

    @property
    def keeps_history(self) -> bool:
        return self.facts.keeps_history

    def of_experts(self, *, whole: bool = False) -> str:
        """How stacked experts are cast; a history would be empty for an expert that nobody visits.

        whole  their weights with one scale for each expert (`ModuleDecision.whole_experts`)
        """
        if self.facts.experts_scale_extent == "block":
            return str(self)
        return f"E4M3, current, one scale per row{', and per expert of a weight' if whole else ''}"

    def __str__(self) -> str:
        if not self.keeps_history:
            return f"{self.fp8_format}, {self.kind}"
        history = f"history {self.amax_history_len} ({self.amax_compute_algo})"
        return f"{self.fp8_format}, {self.kind}, {history}, margin {self.margin}"
