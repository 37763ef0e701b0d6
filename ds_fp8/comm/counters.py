"""Bytes on the wire, counted by kind, beside what DeepSpeed alone would have sent.

Every exchange of this package reports what this rank put on the network, and the bytes of the collective that it
replaces. The ratio of the two is the whole promise of an FP8 wire, so it is measured, not assumed: the banner, the
telemetry and the benchmarks read it here.

Counted are bytes that leave this rank, by the least that any algorithm can send: an all-gather of n bytes per rank
sends n * (W - 1), a reduce-scatter of n bytes n * (W - 1) / W, an all-reduce twice that. Real backends may send more
(gloo's reduce_scatter sends as much as its all-reduce); `benchmarks/bench_wire.py` counts those in the kernel.

Kinds: `gradient` and `weight` are quantized values (or 16-bit elements where nothing is quantized), `scale` are scales
and amaxes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("gradient", "weight", "scale")


@dataclass
class WireCounters:
    """Running sums since `reset`, in bytes sent by this rank.

    sent     what our exchanges sent, by kind
    instead  what DeepSpeed would have sent for the same tensors, by kind; scales have no counterpart, so 0
    """

    sent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    instead: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def add(self, kind: str, sent_bytes: int, instead_bytes: int = 0) -> None:
        self.sent[kind] += sent_bytes
        self.instead[kind] += instead_bytes

    def reset(self) -> None:
        for kind in KINDS:
            self.sent[kind] = self.instead[kind] = 0

    @property
    def sent_bytes(self) -> int:
        return sum(self.sent.values())

    @property
    def instead_bytes(self) -> int:
        return sum(self.instead.values())

    def ratio(self) -> float:
        """Bytes sent for each byte that DeepSpeed would have sent; 1.0 before the first exchange."""
        return self.sent_bytes / self.instead_bytes if self.instead_bytes else 1.0

    def to_json(self) -> dict[str, object]:
        return {"sent_bytes": dict(self.sent), "deepspeed_bytes": dict(self.instead), "ratio": self.ratio()}

    def __str__(self) -> str:
        parts = ", ".join(f"{kind} {self.sent[kind] / 1e6:.1f} MB" for kind in KINDS if self.sent[kind])
        return f"{parts or 'nothing sent'}; {self.ratio():.2f}x of DeepSpeed's {self.instead_bytes / 1e6:.1f} MB"


counters = WireCounters()
"""The one set of counters of this process."""


def all_reduce_bytes(numel: int, element_bytes: int, world_size: int) -> int:
    """Bytes a rank sends in an all-reduce: every element leaves twice, but for its own share."""
    return 2 * numel * element_bytes * (world_size - 1) // world_size


def all_gather_bytes(own_bytes: int, world_size: int) -> int:
    """Bytes a rank sends when its part reaches all the others."""
    return own_bytes * (world_size - 1)
