"""One message of quantized values and scales: what travels when a gradient goes FP8.

    message to owner d   | quantized values of d's slice, 1 byte each | 0 to 3 bytes of padding | fp32 scale_inv per 128
                         elements |

Quantized values and scales travel together as uint8, so any backend carries them (none of them knows float8), one
collective suffices, and no rank has to learn another rank's amax: every rank casts with its own block scales.
The sum is formed at the owner in fp32. Nothing can saturate there, and the error of the mean *falls* with the number
of ranks, where adding in FP8 makes it grow (docs/numerics.md, the gradient wire).

A block with inf or NaN has scale_inv = NaN and decodes to NaN everywhere: the owner's norm turns NaN, every rank
learns it from the norm's own all-reduce, and all of them skip the step together.

The owner's own contribution never travels, so it is never cast: it enters the sum as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..formats import BLOCK_SIZE, FORMATS, Format
from ..numerics.flat import blocks_of

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

    def chunks(self, numels: Sequence[int], device: torch.device) -> Iterator[list[tuple[int, int]]]:
        """Cut the owners' slices into rounds: for each round, (start, stop) within every owner's slice.

        All cuts are at multiples of 128, so the blocks are those of the whole slice. Depends on the sizes alone,
        which all ranks agree on.
        """
        limit = self.chunk_numel or CHUNK_NUMEL["cpu" if device.type == "cpu" else "other"]
        rounds = max(1, -(-sum(numels) // limit))
        steps = [-(-numel // (rounds * BLOCK_SIZE)) * BLOCK_SIZE for numel in numels]
        for index in range(rounds):
            cut = [(min(n, index * step), min(n, (index + 1) * step)) for n, step in zip(numels, steps, strict=True)]
            if any(start < stop for start, stop in cut):
                yield cut


def scale_offset(numel: int) -> int:
    """Where the scales begin in a message of `numel` quantized values: the next multiple of 4, so that fp32 views are
    legal.
    """
    return -(-numel // 4) * 4


def message_bytes(numel: int) -> int:
    return scale_offset(numel) + 4 * blocks_of(numel)


def message_views(message: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """The quantized values [..., numel] uint8 and scale_inv [..., blocks] fp32 inside `message` [...,
    message_bytes(numel)].
    """
    quantized = message[..., :numel]
    scale_inv = message[..., scale_offset(numel) : message_bytes(numel)].view(torch.float32)
    return quantized, scale_inv


def write_message(x: Tensor, fmt: Format, message: Tensor) -> None:
    """Cast `x` [n] straight into `message` [message_bytes(n)] uint8, each block under the better of two scales."""
    if x.numel():
        kernels.flat_encode(x, fmt, best_of_two=True, out=message_views(message, x.numel()))
