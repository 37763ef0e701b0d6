"""Long lists of tensors in portions of a bounded size, each for one message or one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def portions(items: Iterable[Item], numel_of: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Cut into lists of at most `most` elements together, or of one item; in order, so alike on all ranks."""
    portion: list[Item] = []
    numel = 0
    for item in items:
        more = numel_of(item)
        if portion and numel + more > most:
            yield portion
            portion, numel = [], 0
        portion.append(item)
        numel += more
    if portion:
        yield portion
