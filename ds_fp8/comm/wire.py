"""What travels when a gradient goes FP8: to each owner one message of quantized values and scales, in rounds.

Quantized values and scales travel together as uint8, so any backend carries them (none of them knows float8), one
collective suffices, and no rank has to learn another rank's amax: every rank casts with its own block scales.
The sum is formed at the owner in fp32. Nothing can saturate there, and the error of the mean *falls* with the number
of ranks, where adding in FP8 makes it grow (docs/numerics.md, the gradient wire).

A block with inf or NaN has scale_inv = NaN and decodes to NaN everywhere: the owner's norm turns NaN, every rank
learns it from the norm's own all-reduce, and all of them skip the step together.

The owner's own contribution never travels, so it is never cast: it enters the sum as it is.
How a message lies in memory: `numerics.messages`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..formats import BLOCK_SIZE, FORMATS, Format

CHUNK_NUMEL = {"cpu": 1 << 23, "other": 1 << 26}
"""Elements in flight per message. Small enough that temporaries stay bounded and that casts overlap with the
network; large enough that latency does not count. The same on all ranks, as it shapes the messages."""


@dataclass(frozen=True)
class Wire:
    """How one kind of tensor crosses the network.

    fmt          E4M3 or E5M2; None sends the tensor's own dtype (`none`: high precision, still reduced in fp32)
    chunk_numel  elements exchanged at once; None chooses by device
    """

    fmt: Format | None
    chunk_numel: int | None = None

    @classmethod
    def named(cls, name: str, chunk_numel: int | None = None) -> Wire:
        """From the JSON's words: `e4m3`, `e5m2`, `none`."""
        return cls(None if name == "none" else FORMATS[name], chunk_numel)

    def __str__(self) -> str:
        return self.fmt.name if self.fmt else "none"

    def limit(self, device: torch.device) -> int:
        """Elements exchanged at once on this device."""
        return self.chunk_numel or CHUNK_NUMEL["cpu" if device.type == "cpu" else "other"]

    def chunks(self, numels: Sequence[int], device: torch.device) -> Iterator[list[tuple[int, int]]]:
        """Cut the owners' slices into rounds: for each round, (start, stop) within every owner's slice.

        All cuts are at multiples of 128, so the blocks are those of the whole slice. Depends on the sizes alone,
        which all ranks agree on.
        """
        rounds = max(1, -(-sum(numels) // self.limit(device)))
        steps = [-(-numel // (rounds * BLOCK_SIZE)) * BLOCK_SIZE for numel in numels]
        for index in range(rounds):
            cut = [(min(n, index * step), min(n, (index + 1) * step)) for n, step in zip(numels, steps, strict=True)]
            if any(start < stop for start, stop in cut):
                yield cut
