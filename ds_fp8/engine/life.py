"""FP8 layers live as long as their engine: what happens to a model before a new engine and after its engine.

    engine.destroy()         layers, weights, hooks and methods are the unmodified model's again (`Attachment.detach`)
    initialize(same model)   the earlier engine is detached first, whatever the new JSON says; then the plan starts anew
    initialize(a copy)       a copied or unpickled model brings layers of an engine that is not its own: restored
    initialize(shares some)  each engine computes with its own form of the modules that they share (`layers/owners.py`)

DeepSpeed's own hooks keep an engine alive as long as its model, so an engine that a script has merely forgotten counts
as living; for the same model it does not matter. An engine that dies with its model (`__del__`) must not communicate:
its layers are restored where that needs no other rank.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import PlanError
from .printing import print_rank_0

CALLERS = 4
"""Frames between `__del__` and us at most."""

_attachments: weakref.WeakSet[Any] = weakref.WeakSet()

_unmodified_models: weakref.WeakSet[Any] = weakref.WeakSet()
"""Models of engines without our sections: they may share modules with engines that have them."""


def register(attachment: Any) -> None:
    """An engine begins to own layers of its model."""
    _attachments.add(attachment)


def forget(attachment: Any) -> None:
    """It owns nothing any more; models of other engines that shared its layers alone need not take turns."""
    from ..layers.owners import owners_of, remove_turns

    _attachments.discard(attachment)
    for model in _unmodified_models:
        if not any(owners_of(module) for module in model.modules()):
            remove_turns(model, None)


@contextmanager
def unmodified(model: Any, *, plans: bool) -> Iterator[None]:
    """Inside, `model` is as its script made it: every layer unmodified, so that the engine that comes may plan and
    swap.

    plans  the engine has our sections
    Detaching an engine at O3 gathers weights: collective, as `initialize` is. Raises PlanError where layers cannot be
    shared.
    """
    _unmodified_models.discard(model)
    if "ds_fp8.layers" not in sys.modules and not plans:  # nothing was ever swapped, or unpickled, in this process
        yield
        _unmodified_models.add(model)
        return
    from ..layers.sharing import lift, put_back

    _detach_earlier(model)
    restore_leftovers(model)
    _refuse_released(model)
    lifted = lift(model) if plans else []
    try:
        yield
    finally:
        put_back(lifted)
    if not any(attachment.model is model for attachment in _attachments):
        _unmodified_models.add(model)
    _take_turns(model)


def _detach_earlier(model: Any) -> None:
    """Engines that were made for this very model and not destroyed."""
    for attachment in list(_attachments):
        if attachment.model is model:
            print_rank_0("this model's earlier engine was not destroyed: it is detached from its FP8 layers now")
            attachment.detach()


def restore_leftovers(model: Any) -> None:
    """Layers that an engine swapped which is not here: those of a copied or unpickled model."""
    from ..layers import restore_layers
    from ..layers.owners import owners_of

    living = {id(attachment.fp8_state) for attachment in _attachments}
    owners = {id(owner.fp8_state): owner for module in model.modules() for owner in owners_of(module)}
    for key, owner in owners.items():
        if owner.by_engine and key not in living:
            restore_layers(model, owner.fp8_state)


def _refuse_released(model: Any) -> None:
    """A weight that one engine has released cannot be in another's model."""
    from ..layers.owners import owners_of

    fp8_states = {id(owner.fp8_state) for module in model.modules() for owner in owners_of(module)}
    if any(attachment.releases_weights for attachment in _attachments if id(attachment.fp8_state) in fp8_states):
        raise PlanError(
            "this model has layers of another engine that was not destroyed, whose opt_level O3 keeps their weights as"
            " 8-bit values.\n  Call that engine's destroy() first, or use opt_level O2 there."
        )


def _take_turns(model: Any) -> None:
    """Where the new engine's model shares FP8 layers with others, each computes with its own form of them."""
    from ..layers.owners import Turn, owners_of, remove_turns
    from ..layers.sharing import share

    fp8_states = {id(one.model): (one.model, one.fp8_state) for one in _attachments}
    fp8_states.update(
        {
            id(unmodified_model): (unmodified_model, None)
            for unmodified_model in _unmodified_models
            if id(unmodified_model) not in fp8_states
        }
    )
    here = {id(module) for module in model.modules()}
    sharing = [
        (other, fp8_state)
        for other, fp8_state in fp8_states.values()
        if other is model or any(id(m) in here for m in other.modules())
    ]
    shared = share([other for other, _ in sharing])
    if not shared:
        return
    layers = sum(1 for module in shared if owners_of(module))
    print_rank_0(
        f"{layers} layers of this model belong to another engine too, which was not destroyed: each engine "
        "computes with its own form of them"
    )
    for other, fp8_state in sharing:
        remove_turns(other, fp8_state)
        Turn(other, fp8_state, shared)


def is_collected() -> bool:
    """Whether the engine's `destroy` was called by its `__del__`: at any time, on any rank, so nothing may communicate.

    Asked of the stack, because an object that is being collected looks like any other; others may have wrapped
    `destroy`.
    """
    frame: Any = sys._getframe(2)
    for _ in range(CALLERS):
        if frame is None:
            return False
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
