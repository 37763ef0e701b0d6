"""How a flat bucket of gradients is cut: whose is what, and in which rounds it travels.

A bucket of the same parameters is cut in the same way in every step, so a `Cut` is made once and found again by the
sizes that it follows from; its rounds, and the tables of them that a GPU keeps, last as long as it does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..numerics.messages import Layout, Span, between, merged
from .wire import Wire


@dataclass(frozen=True, eq=False)
class Round:
    """What travels at once.

    start   where this round begins in the own slice
    numels  elements of each owner's part
    sent    the messages to the other ranks, in rank order
    own     the own part, which is not sent
    """

    start: int
    numels: tuple[int, ...]
    sent: Layout
    own: Layout


@dataclass(frozen=True, eq=False)
class Cut:
    """The slice of every owner, as spans of one flat tensor in the order of its sequence."""

    spans: tuple[tuple[Span, ...], ...]
    _rounds: dict[tuple[int, int], list[Round]] = field(default_factory=dict)

    @functools.cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each owner's slice."""
        return Layout(self.spans).numels

    def rounds(self, wire: Wire, rank: int, device: torch.device) -> list[Round]:
        """In the order in which they travel; all ranks have the same sizes, and so the same rounds."""
        key = (wire.limit(device), rank)
        if key not in self._rounds:
            self._rounds[key] = [self._round(cut, rank) for cut in wire.chunks(self.numels, device)]
        return self._rounds[key]

    def whole(self, rank: int) -> Round:
        """All of it at once."""
        if (0, rank) not in self._rounds:
            self._rounds[0, rank] = [self._round([(0, numel) for numel in self.numels], rank)]
        return self._rounds[0, rank][0]

    def _round(self, cut: Sequence[Span], rank: int) -> Round:
        parts = [between(spans, *bounds) for spans, bounds in zip(self.spans, cut, strict=True)]
        numels = tuple(stop - start for start, stop in cut)
        return Round(cut[rank][0], numels, Layout((*parts[:rank], *parts[rank + 1 :])), Layout((parts[rank],)))


@functools.lru_cache(maxsize=256)
def cut_at(numels: tuple[int, ...]) -> Cut:
    """Slices of these sizes, one after the other."""
    bounds = pairwise(accumulate(numels, initial=0))
    return Cut(tuple(merged([span]) for span in bounds))


@functools.lru_cache(maxsize=256)
def cut_by_owner(fragments: tuple[tuple[int, int], ...], world_size: int) -> Cut:
    """Fragments (owner, elements), one after the other."""
    by_owner: list[list[Span]] = [[] for _ in range(world_size)]
    start = 0
    for owner, numel in fragments:
        by_owner[owner].append((start, start + numel))
        start += numel
    return Cut(tuple(merged(spans) for spans in by_owner))


@functools.lru_cache(maxsize=256)
def cut_each(numels: tuple[int, ...], world_size: int, starts: tuple[int, ...] | None = None) -> Cut:
    """Tensors of these sizes, of each of which owner d has chunk d (as ZeRO 3 cuts parameters).

    starts  where they begin; by default one after the other
    """
    by_owner: list[list[Span]] = [[] for _ in range(world_size)]
    for numel, start in zip(numels, starts or accumulate(numels[:-1], initial=0), strict=True):
        for owner, (first, last) in enumerate(chunk_bounds(numel, world_size)):
            by_owner[owner].append((start + first, start + last))
    return Cut(tuple(merged(spans) for spans in by_owner))


def chunk_bounds(numel: int, world_size: int) -> list[Span]:
    """Equal chunks of `numel` elements; the last ones may be short or empty."""
    chunk = -(-numel // world_size)
    return [(min(d * chunk, numel), min((d + 1) * chunk, numel)) for d in range(world_size)]


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view of all of them as one flat tensor, where they lie one after the other in memory."""
    filled = [tensor for tensor in tensors if tensor.numel()]  # an empty one has no address
    first = filled[0] if filled else tensors[0]
    if len(filled) < 2:
        return first
    end = first.data_ptr()
    for tensor in filled:
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += tensor.numel() * tensor.element_size()
    return first.as_strided((sum(tensor.numel() for tensor in filled),), (1,))


def together(tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """One flat tensor of all, in any order, and where each begins; without a copy when they fill a piece of memory."""
    order = sorted(range(len(tensors)), key=lambda index: tensors[index].data_ptr())
    found = adjacent([tensors[index] for index in order])
    if found is None:
        found, order = torch.cat(list(tensors)), list(range(len(tensors)))
    starts, start = [0] * len(tensors), 0
    for index in order:
        starts[index] = start
        start += tensors[index].numel()
    return found, tuple(starts)


def join(tensors: Sequence[Tensor]) -> Tensor:
    """One flat tensor of all; without a copy when they lie one after the other in memory."""
    found = adjacent(tensors)
    return torch.cat(list(tensors)) if found is None else found
