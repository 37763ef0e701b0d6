"""Adapters merged into a live model: the layers that PEFT leaves behind are unmodified again.

`merge_and_unload()` and `unload()` take the adapters away and return the base model, for inference or to be saved. Its
layers would still be FP8 layers, although nobody trains them any more. PEFT's methods are wrapped when an engine first
gets such a model, and restored by `deactivate()`; models without our layers are left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

METHODS = ("merge_and_unload", "unload")

_originals: dict[tuple[type, str], Callable] = {}


def follow_merges(model: Any) -> None:
    """Wrap the methods of PEFT's classes that occur in this model. Twice is the same as once."""
    classes = {
        base for module in model.modules() for base in type(module).__mro__ if base.__module__.startswith("peft.")
    }
    for owner in classes:
        for name in METHODS:
            method = vars(owner).get(name)
            if method is not None and (owner, name) not in _originals:
                _originals[owner, name] = method
                setattr(owner, name, _then_restore(method))


def restore() -> None:
    """Give PEFT's classes their own methods back."""
    for (owner, name), method in _originals.items():
        setattr(owner, name, method)
    _originals.clear()


def _then_restore(method: Callable) -> Callable:
    @functools.wraps(method)
    def merged(*args: Any, **kwargs: Any) -> Any:
        from ..layers import restore_layers
        from ..layers.owners import owners_of
        from .printing import print_rank_0

        model = method(*args, **kwargs)
        ours = sum(bool(owners_of(module)) for module in model.modules())
        if ours:
            restore_layers(model)
            print_rank_0(f"adapters taken out: {ours} FP8 layers of this model are unmodified again")
        return model

    return merged
