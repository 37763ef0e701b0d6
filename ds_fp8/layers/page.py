"""One page of the scale book: what one layer keeps between calls; and the `Call` that one forward is handed.

A page holds no parameter and no buffer, so a module's state_dict, its `parameters()` and DeepSpeed's view of it stay
those of the plain layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..formats import Format
from ..recipe import HighPrecision, Recipe
from .operands import Operand
from .ran import Ran
from .regions import Region

if TYPE_CHECKING:
    from .scale_book import ScaleBook

ALL_HIGH = HighPrecision(True, True, True)


class WeightCodes(NamedTuple):
    """A weight that somebody else cast (O3), ready for the products.

    data       [N, K] float8, in the recipe's forward format
    scale_inv  0-d fp32, or [ceil(N/128), ceil(K/128)] under the block recipe
    """

    data: torch.Tensor
    scale_inv: torch.Tensor


class Page:
    """State of one FP8 layer.

    index               position in the book
    weight_codes        codes set from outside (O3); the layer then never reads its weight
    staged_weight_amax  amax of those codes, recorded at the layer's next recording call
    is_shared           engines that know nothing of each other may step the weight, so that its codes are never kept
    ran                 what the layer's products did in the first step, while that lasts (`ran.py`)
    ready               the codes of `cached_weight` as the GPU's products read them (cuda_products)
    fast_step           what the rows of an input must be a multiple of for the GPU's fast road, 0 for never (cuda_products)
    """

    def __init__(self, book: ScaleBook, index: int, fqn: str):
        self.book = book
        self.index = index
        self.fqn = fqn
        self.input_column = 2 * index
        self.weight_column = 2 * index + 1
        self.grad_output_column = 2 * len(book.names) + index
        self.weight_codes: WeightCodes | None = None
        self.staged_weight_amax: torch.Tensor | None = None
        self.fast_step: int | None = None
        self.is_shared = False
        self.ran: Ran | None = None
        self.forget_weight()

    def note_forward(self, high: HighPrecision, *, dgrad: bool, wgrad: bool) -> None:
        """A forward has multiplied, and its backward will be asked for these products."""
        if self.ran is not None:
            self.ran.forward(high, dgrad=dgrad, wgrad=wgrad)

    def note_backward(self, high: HighPrecision, *, dgrad: bool, wgrad: bool) -> None:
        if self.ran is not None:
            self.ran.backward(high, dgrad=dgrad, wgrad=wgrad)

    def note_call(self) -> None:
        """The layer computed in high precision: in eval mode."""
        if self.ran is not None:
            self.ran.called = True

    def forget_weight(self) -> None:
        """Drop codes that this layer made itself."""
        self.cached_key: tuple[int, ...] | None = None
        self.cached_weight: Operand | None = None
        self.ready: Any = None
        self.cached_scale: tuple[torch.Tensor, torch.Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as a page of the copied book."""
        return _page_of, (self.book, self.fqn)

    def call(self, *, training: bool, device: torch.device) -> Call | None:
        """What one forward needs; None when it is to compute in high precision."""
        return self.book.call(self, training=training, device=device)


def _page_of(book: ScaleBook, fqn: str) -> Page:
    return book.page(fqn)


@dataclass(eq=False, slots=True)
class Call:
    """One forward of one layer, and its backward.

    region   scales to cast with; None unless the scaling is delayed
    records  amaxes of input and weight count: not in a recompute. That of grad_output counts in a recompute too, whose
             graph is the one that reentrant checkpointing differentiates (`records_gradient`).
    warming  before `start_step`: compute in high precision, record all the same
    """

    page: Page
    region: Region | None
    records: bool
    warming: bool

    @property
    def recipe(self) -> Recipe:
        return self.page.book.recipe

    @property
    def high(self) -> HighPrecision:
        """The products that run in high precision in this call."""
        return ALL_HIGH if self.warming else self.recipe.override_linear_precision

    @property
    def caches_weight(self) -> bool:
        return self.page.book.plan.weight_cache and not self.page.is_shared

    def scale(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, scale_inv), 0-d fp32, frozen since the region opened."""
        assert self.region is not None, "only delayed scaling knows a scale before the tensor"
        return self.region.scale[column], self.region.scale_inv[column]

    @property
    def records_gradient(self) -> bool:
        return self.region is not None and self.region.records

    def records_column(self, column: int) -> bool:
        return self.records_gradient if column == self.page.grad_output_column else self.records

    def record(self, column: int, amax: torch.Tensor) -> None:
        assert self.region is not None, "only delayed scaling records"
        self.page.book.record(self.region, column, amax)

    def raised(self, column: int) -> torch.Tensor | None:
        """The book's pending amaxes, whose entry `column` a kernel itself raises; None where it does not count."""
        if not self.records_column(column):
            return None
        assert self.region is not None, "only delayed scaling records"
        self.page.book.raised_slot(self.region, column)
        return self.page.book.pending

    def format_of(self, column: int) -> Format:
        recipe: Any = self.recipe
        return recipe.backward_format if column == self.page.grad_output_column else recipe.forward_format
