"""Rows sorted by expert: where each expert's rows begin and end, on the device and, where a loop needs it, on the host."""

from __future__ import annotations

import torch

ALIGNMENT = 16
"""A grouped product that sums over the rows reads 16 bytes at a time: there each expert's rows begin at a multiple."""


class Groups:
    """The rows of `counts.numel()` experts, one expert after the other; rows behind the last one belong to none.

    counts  [experts] integers, rows of each expert
    rows    rows in all
    """

    def __init__(self, counts: torch.Tensor, rows: int):
        self.counts, self.rows = counts, rows
        self.experts = counts.numel()
        self.ends = counts.cumsum(0, dtype=torch.int32)
        self._bounds: list[tuple[int, int]] | None = None
        self._owner: torch.Tensor | None = None

    @property
    def owner(self) -> torch.Tensor:
        """[rows] int64: the expert of each row, `experts` for rows of none. Waits for nothing."""
        if self._owner is None:
            places = torch.arange(self.rows, device=self.counts.device, dtype=torch.int32)
            self._owner = torch.searchsorted(self.ends, places, right=True)
        return self._owner

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(first row, row behind the last) of each expert, on the host: waits for the device once."""
        if self._bounds is None:
            ends = self.ends.tolist()
            self._bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        return self._bounds

    def aligned(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Room for each expert up to a multiple of ALIGNMENT: (ends [experts] int32, place of each row [rows] int64, room).

        `room` needs no look at the counts: the most that could be wanted, and one place for rows of none.
        """
        padded = (self.counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        ends = padded.cumsum(0)
        shift = torch.cat([ends - padded - (self.ends.long() - self.counts), ends.new_zeros(1)])
        places = torch.arange(self.rows, device=ends.device) + shift[self.owner]
        room = self.rows + self.experts * ALIGNMENT
        room = -(-room // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        return ends.to(torch.int32), torch.where(self.owner < self.experts, places, room - 1), room
