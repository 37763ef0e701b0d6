"""Regions: which forward a cast belongs to, and whether its amax counts.

A region is one forward of the root module with everything its backward does later. All casts of a region use the
scales as they stood when it opened, so a forward and its recompute under activation checkpointing see the same ones,
and an amax is recorded once:

    forward      root's pre-forward hook opens the region, its forward hook closes it
    backward     hooks on the root's outputs say which region is being differentiated (a pipeline has several in flight)
    recompute    a forward inside a backward: recognised by autograd's graph task; uses that region, never records

A layer that is called while no root forward runs (a submodule called by itself) opens an implicit region, which lasts
until one of its layers is called again or a backward has run: about one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch


@dataclass(eq=False)
class Region:
    """Scales of one forward, frozen.

    frozen            [columns of the book, 4] fp32: scale_inv, at multiples of 16 bytes because cuBLASLt reads it only there,
                      then scale
    scale, scale_inv  the same as 0-d fp32 views, made when somebody asks: the GPU's casts do not
    records           amaxes of this region are folded into the histories
    implicit          opened by a layer, not by the root
    seen              pages called in it, kept for implicit regions only
    """

    frozen: torch.Tensor
    records: bool
    implicit: bool = False
    saw_backward: bool = False
    seen: set[int] = field(default_factory=set)

    @cached_property
    def scale_inv(self) -> tuple[torch.Tensor, ...]:
        return self.frozen.select(1, 0).unbind(0)

    @cached_property
    def scale(self) -> tuple[torch.Tensor, ...]:
        return self.frozen.select(1, 1).unbind(0)


def in_backward() -> bool:
    """True inside a backward pass, so in the recompute of activation checkpointing too."""
    return torch._C._current_graph_task_id() != -1


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """Tensors in what a module returned: tuples, lists, dicts, dataclasses and objects like HF's ModelOutput."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_of(value)
    elif hasattr(output, "__dataclass_fields__"):
        for name in output.__dataclass_fields__:
            yield from tensors_of(getattr(output, name))
