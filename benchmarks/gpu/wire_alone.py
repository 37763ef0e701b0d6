"""What the wire costs beyond the link, on one GPU: a bucket cast for its owners and summed by one of them.

1 GiB of bf16 gradients (512M elements) is cut for W ranks in two ways: `flat` as ZeRO 1 and 2 and one exchange cut it
(a piece for each owner), `parameters` as ZeRO 3 does (a chunk of each parameter of a Llama of 8B width). Rank 0 casts
what the others own and sums its own slice with what W - 1 others have sent (its own messages stand for them); nothing
travels. Beside it the same work as copies: `copy` moves as many bytes from device to device as the casts read and
write. `arranged first` is the way with a copy that puts every owner's chunks together, a cast for each owner, a sum in
fp32 and a last cast, all of which the messages do without.

    python benchmarks/gpu/wire_alone.py

Less than a minute; a line of JSON for each row: milliseconds on the device (median, spread), on the host, and launches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from timing import alternate, free, host_ms

from ds_fp8 import kernels
from ds_fp8.comm import Wire
from ds_fp8.comm.cut import Cut, cut_at, cut_each
from ds_fp8.formats import E4M3
from ds_fp8.numerics import messages
from ds_fp8.numerics.messages import message_views, sequence

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NUMEL = 2**29 if CUDA else 2**23
LAYER = (4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096, 14336 * 4096, 14336 * 4096, 14336 * 4096, 4096, 4096)
"""Parameters of a layer of Llama 8B, in elements."""


class Bucket:
    """Gradients, the messages made of them, and the own sum."""

    def __init__(self, cut: Cut, gradients: torch.Tensor) -> None:
        self.gradients = gradients
        self.cut = cut
        self.rounds = cut.rounds(Wire(E4M3), 0, gradients.device)
        self.sent = [torch.zeros(sum(part.sent.bytes), dtype=torch.uint8, device=DEVICE) for part in self.rounds]
        self.out = torch.empty(cut.numels[0], dtype=torch.bfloat16, device=DEVICE)
        self.exact = torch.empty_like(self.out, dtype=torch.float32)

    def arrived(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What others sent, as far as numbers go: messages of the own part's size."""
        part, others = self.rounds[index], len(self.cut.numels) - 1
        return message_views(self.sent[index][: others * part.own.bytes[0]].view(others, -1), part.own.numels[0])

    def own_slice(self, index: int, of: torch.Tensor) -> torch.Tensor:
        part = self.rounds[index]
        return of[part.start : part.start + part.own.numels[0]]

    def encode(self) -> None:
        for part, sent in zip(self.rounds, self.sent, strict=True):
            kernels.encode_messages(self.gradients, part.sent, E4M3, sent)

    def add(self) -> None:
        for index, part in enumerate(self.rounds):
            kernels.sum_messages(
                *self.arrived(index), E4M3, self.gradients, part.own, factor=0.5, out=self.own_slice(index, self.out)
            )

    def both(self) -> None:
        self.encode()
        self.add()

    def arranged_first(self) -> None:
        slices = [sequence(self.gradients, spans) for spans in self.cut.spans]
        starts = [0] * len(slices)
        for index, part in enumerate(self.rounds):
            pieces = self.sent[index].split(part.sent.bytes)
            for owner, (numel, message) in enumerate(zip(part.sent.numels, pieces, strict=True), start=1):
                x = slices[owner][starts[owner] : starts[owner] + numel]
                kernels.flat_encode(x, E4M3, best_of_two=True, out=message_views(message, numel))
                starts[owner] += numel
            own, exact = self.own_slice(index, slices[0]), self.own_slice(index, self.exact)
            kernels.flat_sum(*self.arrived(index), E4M3, factor=0.5, out=exact, own=own)
            self.own_slice(index, self.out).copy_(exact)

    def bytes_moved(self) -> dict[str, int]:
        """Read and written by each half: gradients, messages, the sum."""
        own, others = self.cut.numels[0], sum(self.cut.numels[1:])
        sent = sum(message.numel() for message in self.sent)
        received = sum(part.own.bytes[0] for part in self.rounds) * (len(self.cut.numels) - 1)
        return {"encode": 2 * others + sent, "sum": 2 * own + received + 2 * own}

    def is_exact(self) -> bool:
        """The first round beside the reference on the CPU, to the bit."""
        part, host = self.rounds[0], self.gradients.cpu()
        wanted = torch.zeros(sum(part.sent.bytes), dtype=torch.uint8)
        messages.encode_messages(host, part.sent, E4M3, wanted)
        self.sent[0].zero_()
        self.both()
        equal = torch.equal(self.sent[0].cpu(), wanted)
        total = torch.empty(part.own.numels[0], dtype=torch.bfloat16)
        arrived = tuple(one.cpu() for one in self.arrived(0))
        messages.sum_messages(*arrived, E4M3, host, part.own, factor=0.5, out=total)
        return equal and torch.equal(self.own_slice(0, self.out).cpu(), total)


def parameters(numel: int) -> tuple[int, ...]:
    """As many whole parameters as fit."""
    sizes: list[int] = []
    while sum(sizes) + LAYER[len(sizes) % len(LAYER)] <= numel:
        sizes.append(LAYER[len(sizes) % len(LAYER)])
    return tuple(sizes) or (numel,)


def launches(work: Callable[[], None]) -> int:
    """Kernels that the device ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in found.key_averages() if event.device_type.name == "CUDA")


def copier(size: int) -> Callable[[], Any]:
    """A copy that reads and writes `size` bytes together."""
    source = torch.empty(size // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def main() -> None:
    gradients = torch.randn(NUMEL, device=DEVICE, dtype=torch.bfloat16)
    small = 2**22 + 4 * 77
    for cut in (cut_at((small // 4,) * 4), cut_each((2**20, 77 * 4, 3 * 2**20), 4)):
        assert Bucket(cut, gradients[:small].contiguous()).is_exact()
    if not CUDA:
        return
    for world_size in (2, 8):
        sizes = parameters(NUMEL)
        cuts = {"flat": cut_at((NUMEL // world_size,) * world_size), "parameters": cut_each(sizes, world_size)}
        for name, cut in cuts.items():
            bucket = Bucket(cut, gradients)
            moved = bucket.bytes_moved()
            works: dict[str, Callable[[], Any]] = {
                "encode": bucket.encode,
                "sum": bucket.add,
                "encode and sum": bucket.both,
                "arranged first": bucket.arranged_first,
                "copy of encode's bytes": copier(moved["encode"]),
                "copy of sum's bytes": copier(moved["sum"]),
            }
            found = alternate(works)
            for what, work in works.items():
                row = {"world_size": world_size, "cut": name, "rounds": len(bucket.rounds), "work": what}
                row |= {**found[what], "host_ms": host_ms(work), "launches": launches(work)}
                print(json.dumps(row), flush=True)
            del bucket, works
            free()


if __name__ == "__main__":
    main()
