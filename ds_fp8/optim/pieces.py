"""A gradient in pieces: the step takes it chunk by chunk and lets each piece go, so it never lies in memory twice.

ZeRO 1 and 2 have the gradient of a partition as a list of tensors, one per parameter. Flattened, as DeepSpeed does, it
is there twice at the peak of the step: 2 bytes per parameter and rank more than before it. Here only one chunk is flat
at a time. A chunk starts at a multiple of its length, a power of two, which makes it a whole number of blocks and lets
stochastic rounding draw the bits of the whole partition (`random_bits.seed_at`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..levels import Level
from . import codecs, masters

CPU_NUMEL, GPU_NUMEL = 2**20, 2**26
"""Elements of a chunk: on a CPU it stays in the cache, on a GPU it takes much longer than its launch."""

ALIGNMENT_BYTES = 16


class Pieces:
    """Pieces of a gradient in order of the elements. They are consumed: hold no other reference to them.

    numel  of all; a partition's end that no piece covers has gradient zero
    """

    def __init__(self, pieces: Sequence[torch.Tensor], numel: int):
        self._rest = deque(piece.detach() for piece in pieces)
        given = sum(piece.numel() for piece in self._rest)
        assert given <= numel, f"{given} gradients for {numel} weights"
        self.dtype, self.device, self.numel = pieces[0].dtype, pieces[0].device, numel
        if given < numel:
            self._rest.append(torch.zeros(numel - given, dtype=self.dtype, device=self.device))

    def chunks(self, chunk_numel: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first element, gradient from there on), in order; what was yielded is forgotten."""
        size = chunk_numel or (CPU_NUMEL if self.device.type == "cpu" else GPU_NUMEL)
        assert size & (size - 1) == 0, f"{size} is no power of two"
        for start in range(0, self.numel, size):
            yield start, self._take(min(size, self.numel - start))

    def _take(self, numel: int) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        while numel:
            piece = self._rest.popleft().reshape(-1)
            if piece.numel() > numel:
                self._rest.appendleft(piece[numel:])
                piece = piece[:numel]
            numel -= piece.numel()
            parts.append(piece)
        if len(parts) == 1 and parts[0].data_ptr() % ALIGNMENT_BYTES == 0:
            return parts[0]
        return torch.cat(parts)


def state_at(
    state: dict[str, Any], moments: Sequence[str], level: Level, flat: torch.Tensor, start: int, stop: int
) -> dict[str, Any]:
    """The state of elements [start, stop): views of the same tensors; `first` says where they begin."""
    part = {**state, "first": start}
    for moment in moments:
        fmt = getattr(level, moment)
        storage = codecs.moment_storage(state, moment, fmt).chunk(start, stop)
        part |= {key: getattr(storage, field) for field, key in codecs.keys_of(moment, fmt).items()}
    master = masters.master_storage(state, level.master, flat).chunk(start, stop)
    part |= {key: getattr(master, field) for field, key in masters.keys_of(master.format).items()}
    return part
