"""torch.func and released weights: memory for a Parameter that a transform is about to wrap.

vmap, grad, vjp, jvp and their like wrap their arguments in C++, where no `__torch_function__` is asked, and read the
memory of what they wrapped. So while some weight of this process is released, the two functions that wrap are ours:
they give a released weight its decoded values as memory before (`weights_released.give_memory`) and then are torch's
own. Gradients belong to the transform and need nothing. The memory goes with the next step.

This changes two names of `torch._functorch`, the one place where we touch torch, because there is no hook for it;
without it these transforms would read NaN. Torch's own are back when the last engine that releases weights has ended.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable
from typing import Any

from .weights_released import give_memory, is_released

PLACES = (("torch._functorch.eager_transforms", "_wrap_for_grad"), ("torch._functorch.vmap", "_add_batch_dim"))
"""Module and name of each function that wraps; its first argument is the tensor."""

_users: weakref.WeakSet[Any] = weakref.WeakSet()
_originals: dict[tuple[str, str], Callable[..., Any]] = {}


def begin(user: Any) -> None:
    """`user`, an optimizer or the like, is going to release weights."""
    _users.add(user)
    for place in PLACES:
        module = importlib.import_module(place[0])
        original = getattr(module, place[1], None)
        if original is not None and place not in _originals:
            _originals[place] = original
            setattr(module, place[1], _readable(original))


def end(user: Any) -> None:
    """`user` has given its weights back."""
    _users.discard(user)
    if _users:
        return
    for (module, name), original in _originals.items():
        setattr(importlib.import_module(module), name, original)
    _originals.clear()


def _readable(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrap(tensor: Any, *args: Any, **named: Any) -> Any:
        if is_released(tensor):
            give_memory(tensor)
        return original(tensor, *args, **named)

    return wrap
