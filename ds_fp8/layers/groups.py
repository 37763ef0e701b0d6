"""Rows sorted by expert, and the stack of their weights: what lies where, on the device and, where a loop needs it,
on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from ..kernels.grouped import zero_experts, zero_tail

if TYPE_CHECKING:
    from .layer_state import QuantizedWeight

ALIGNMENT = 16
"""A grouped product that sums over the rows reads 16 bytes at a time: there each expert's rows begin at a multiple."""

TILE = 128
"""Rows of a tile, which is one expert's, in kernels that look at columns."""


Made = TypeVar("Made")


class Groups:
    """The rows of `counts.numel()` experts, one expert after the other; rows behind the last one belong to none.

    counts  [experts] integers, rows of each expert
    rows    rows in all
    """

    def __init__(self, counts: torch.Tensor, rows: int):
        self.counts, self.rows = counts, rows
        self.experts = counts.numel()
        self._table: torch.Tensor | None = None
        self._ends: list[list[int]] | None = None

    @property
    def table(self) -> torch.Tensor:
        """[3, experts] int32, contiguous: sums up to and with each expert of tiles of TILE rows, of rows, and of rows
        rounded up to ALIGNMENT. Waits for nothing.
        """
        if self._table is None:
            counts = self.counts.to(torch.int32)
            tiles, aligned = (counts + TILE - 1) // TILE, (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
            self._table = torch.stack([tiles, counts, aligned]).cumsum(1, dtype=torch.int32)
        return self._table

    @property
    def ends(self) -> torch.Tensor:
        """[experts] int32: behind each expert's last row."""
        return self.table[1]

    @property
    def room(self) -> int:
        """Rows of the layout where each expert begins at a multiple of ALIGNMENT, itself a multiple: the most that any
        distribution wants, so that nobody looks at the counts.
        """
        return -(-(self.rows + self.experts * (ALIGNMENT - 1)) // ALIGNMENT) * ALIGNMENT

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(first row, row behind the last) of each expert, on the host: waits for the device once."""
        return self._on_host(1)

    @property
    def aligned_bounds(self) -> list[tuple[int, int]]:
        """The same in the layout with `room`, zeros behind each expert's rows included."""
        return self._on_host(2)

    def tail_zero(self, out: torch.Tensor) -> torch.Tensor:
        """`out` [rows, .] with zeros in rows of no expert, in place: a grouped product does not write them."""
        zero_tail(out, self.ends[-1:])
        return out

    def without_rows_zero(self, out: torch.Tensor) -> torch.Tensor:
        """`out` [experts, ., .] with zeros for experts without rows, in place: a product over nothing writes
        nothing.
        """
        zero_experts(out, self.ends)
        return out

    def _on_host(self, line: int) -> list[tuple[int, int]]:
        if self._ends is None:
            self._ends = self.table.tolist()
        ends = self._ends[line]
        return list(zip([0, *ends[:-1]], ends, strict=True))


class Layout(NamedTuple):
    """How the weights of all experts lie, and are cast.

    transposed  [E, K, N] instead of [E, N, K]
    whole       with one scale for each expert, so that the data serve fprop and dgrad; else as the recipe does
    """

    transposed: bool = False
    whole: bool = False


class Stack:
    """The weights of all experts, [E, N, K], during one forward or backward.

    transposed, whole  `Layout`
    column_amaxes  fp32 [E, columns of `data`], once somebody has found them; a backward gets those of its forward
    dgrad_follows  a backward will want them
    kept           quantized values by purpose, for the rest of the optimizer step (`weight_cache`); None keeps none
    given          quantized values that were set from outside (O3, frozen weights); `data` is not read then
    """

    def __init__(self, weight: torch.Tensor, layout: Layout, *, column_amaxes: torch.Tensor | None = None,
                 dgrad_follows: bool = False, kept: dict[str, Any] | None = None,
                 given: QuantizedWeight | None = None):  # fmt: skip
        self._weight, self.given = weight, given
        self.transposed, self.whole = layout
        self.column_amaxes, self.dgrad_follows, self.kept = column_amaxes, dgrad_follows, kept

    @functools.cached_property
    def data(self) -> torch.Tensor:
        """The Parameter's values, [E, N, K], or [E, K, N] if `transposed`."""
        return self._weight.detach().contiguous()

    @property
    def straight(self) -> torch.Tensor:
        """[E, N, K], however the weights lie."""
        return self.data.transpose(1, 2) if self.transposed else self.data

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)"""
        experts, rows, columns = self._weight.shape
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)

    def once(self, purpose: str, make: Callable[[Stack], Made]) -> Made:
        """What `make` makes of this stack; the same as before where it is kept."""
        if self.kept is None:
            return make(self)
        if purpose not in self.kept:
            self.kept[purpose] = make(self)
        return self.kept[purpose]
