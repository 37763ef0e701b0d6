"""A new engine's model holds layers of engines that live: how both get them.

lift(model)       the layers become unmodified, so that the new plan sees torch's own modules
...               the new engine plans and swaps
put_back(lifted)  layers get their earlier owners back, beside the new one where it swapped the same layer
share(models)     no quantized values of a shared weight are kept: another engine may step it, and tells nobody
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import BackendError
from . import swap
from .as_original import ORIGINAL
from .compiled_forms import forms_of
from .owners import Owner, owners_of


@dataclass(eq=False)
class Lifted:
    """A layer that was made unmodified for a while."""

    module: nn.Module
    owners: list[Owner]


def lift(model: nn.Module) -> list[Lifted]:
    """Make layers that engines own unmodified; `put_back` must follow.

    Raises BackendError, before anything is changed, for layers of Transformer Engine, which are objects of their own.
    """
    found = [module for module in model.modules() if any(owner.by_engine for owner in owners_of(module))]
    foreign = [module for module in found if swap.OWN in vars(module)]
    if foreign:
        raise BackendError(
            f"{len(foreign)} layers of this model belong to another engine that was not destroyed, and Transformer "
            "Engine's layers cannot be shared.\n  Call that engine's destroy() first, or set fp8/backend to torch in "
            "both."
        )
    lifted = [Lifted(module, owners_of(module)) for module in found]
    for one in lifted:
        swap.restore(model, one.module)
    return lifted


def put_back(lifted: Sequence[Lifted]) -> None:
    """Give layers their earlier owners back, beside the new one where it swapped them too."""
    for one in lifted:
        if not owners_of(one.module):
            one.module.__dict__[ORIGINAL] = type(one.module)
        swap.give(one.module, [*one.owners, *owners_of(one.module)])


def share(models: Sequence[nn.Module]) -> list[nn.Module]:
    """FP8 layers that several of these models hold, and modules that were compiled for one of them.

    Any of their engines may step the weights, so no quantized values are kept.
    """
    holders: dict[int, list[nn.Module]] = {}
    for model in models:
        for module in model.modules():
            if (owners_of(module) or forms_of(module)) and swap.OWN not in vars(module):
                holders.setdefault(id(module), []).append(module)
    shared = [found[0] for found in holders.values() if len(found) > 1]
    for owner in (owner for module in shared for owner in owners_of(module)):
        if owner.layer_state is not None:
            owner.layer_state.forget_weight()
            owner.layer_state.is_shared = True
    return shared
