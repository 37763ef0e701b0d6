"""Layers without an engine: their scales are updated between one forward pass and the next.

Under a DeepSpeed engine none of this runs: the engine's step takes the amaxes into the histories
(`ModelFp8State.update_scales`), and scales are constant in between. A model without an engine has no such step. Its
histories are updated before the next forward, by this rank alone and without a collective:

    a forward of the root module           everything called in it is one pass
    a layer called while no root runs      one pass lasts until a layer is called again, or a backward has run
    forwards that wait for their backward  share their scales: nothing is updated while one of them is in flight

So a recompute under activation checkpointing meets the scales of its forward. A pass whose results were dropped is not
waited for: its scope is held by the autograd graph alone, and is gone with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch


def in_backward() -> bool:
    """True inside a backward pass, so in the recompute of activation checkpointing too."""
    return torch._C._current_graph_task_id() != -1


class ForwardScope:
    """One forward with gradients; every layer call in it refers to it."""

    __slots__ = ("__weakref__", "saw_backward")

    def __init__(self) -> None:
        self.saw_backward = False


class ForwardScopes:
    """Follows the passes of one model without an engine.

    update  brings recorded amaxes into the histories; called before a new pass when none is in flight
    """

    def __init__(self, update: Callable[[], None]):
        self._update = update
        self._depth = 0
        self._open: ForwardScope | None = None
        self._latest: weakref.ref[ForwardScope] | None = None
        self._called: set[int] = set()
        self._held: ForwardScope | None = None

    def hold(self, scope: ForwardScope | None) -> None:
        """Keep a scope until the next one: no autograd graph does it for a compiled forward."""
        self._held = scope

    def of_call(self, index: int, records: bool) -> ForwardScope | None:
        """The scope of a layer call that happens now; None for one that leaves nothing to wait for.

        Only a call that records can begin a pass: evaluation between two training passes moves no scale.
        """
        scope = self._scope()
        if in_backward() or not records:
            return scope if records else None
        if self._depth == 0 and (index in self._called or scope is None or scope.saw_backward):
            scope = self._begin()
        self._called.add(index)
        return scope

    def before_root(self, records: bool) -> None:
        """A forward of the root begins; `records`: in training, with gradients."""
        if in_backward():
            return
        self._depth += 1
        if self._depth == 1 and records:
            self._open = self._begin()

    def after_root(self, output: Any) -> None:
        """It ends. Under reentrant checkpointing no layer holds the scope, so the graph of the results does."""
        if in_backward() or self._depth == 0:
            return
        self._depth -= 1
        if self._depth == 0:
            for tensor in tensors_of(output):
                node: Any = tensor.grad_fn  # its `metadata` is a dict, which torch's stubs take for a function
                if self._open is not None and node is not None:
                    node.metadata[ForwardScope] = self._open
            self._open = None

    def _begin(self) -> ForwardScope:
        """A pass begins: the scope of one that is in flight, or a new one after an update."""
        self._called.clear()
        scope = self._scope()
        if scope is None or scope.saw_backward:
            self._update()
            scope = ForwardScope()
            self._latest = weakref.ref(scope)
        return scope

    def _scope(self) -> ForwardScope | None:
        return None if self._latest is None else self._latest()


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
