"""Message buffers that are used again: a round's memory serves the next round and the next step.

On the CPU fresh memory is not free: the kernel clears every page before it is touched for the first time, 5000 faults
for the rounds of 25 M elements, as much time as casting them. CUDA's allocator keeps its blocks, so there this file
does nothing.

A buffer belongs to the one who took it until it is given back; nobody gives back what a collective still reads or
writes, that is, before the handle has been waited for.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

MOST_KEPT = 8
"""Buffers kept: a sent and a received one for each half of an all-reduce, and as many for the round in flight."""

_free: list[Tensor] = []
_lock = threading.Lock()


def take(size: int, device: torch.device) -> Tensor:
    """uint8 [size], uninitialised."""
    if device.type == "cpu":
        with _lock:
            fitting = [index for index, kept in enumerate(_free) if kept.numel() >= size]
            if fitting:
                return _free.pop(min(fitting, key=lambda index: _free[index].numel()))[:size]
    return torch.empty(size, dtype=torch.uint8, device=device)


def give_back(*buffers: Tensor) -> None:
    """Buffers of `take`, no longer read or written by anyone. The largest are kept."""
    for buffer in buffers:
        if buffer.device.type == "cpu" and buffer.numel():
            # Whatever slice or dtype it was used as: the bytes of its storage.
            whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(buffer.untyped_storage())
            with _lock:
                _free.append(whole)
                if len(_free) > MOST_KEPT:
                    _free.pop(min(range(len(_free)), key=lambda index: _free[index].numel()))
