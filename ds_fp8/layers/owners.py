"""Whose a layer is: one engine's for as long as that lives, or several engines' at a time.

An engine that swaps the layers of its model owns them until it is destroyed. A model may hold modules that another
living engine holds too: actor and critic share a trunk, a student wraps its teacher. Then each engine computes as if it
were alone: with the FP8 state, scales and recipe of its own JSON, or unmodified if it has no section of ours. Whose
turn it is tell hooks on the models of engines that share (`Turn`; others have none): the one's whose model runs, or is
differentiated.

Owners lie in the layer's `__dict__`, so copies and pickles of a model carry them, with FP8 states of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..plan.shapes import layer_type
from . import norms
from .as_original import ORIGINAL
from .compiled_forms import take_forms
from .experts import take_state
from .experts_state import STATE, ExpertsState
from .forward_scope import tensors_of
from .fp8_linear import Fp8Linear
from .layer_state import LayerFp8State
from .matrix_layer import fp8_class
from .opaque import opaque

if TYPE_CHECKING:
    from .fp8_state import ModelFp8State

OWNERS = "_ds_fp8_owners"
"""Attribute of an FP8 layer: its owners, in the order in which they came."""


class Owner(NamedTuple):
    """Who swapped a layer.

    fp8_state    its FP8 state
    layer_state  the layer's FP8 state there; experts have one of their own kind; None for a norm, which has none
    by_engine    swapped for a DeepSpeed engine, by its JSON; else by a script that called `swap_layers` itself
    """

    fp8_state: ModelFp8State
    layer_state: LayerFp8State | ExpertsState | None
    by_engine: bool


def owners_of(module: nn.Module) -> list[Owner]:
    """Empty for a module that is not ours."""
    return vars(module).get(OWNERS, [])


def take_form(module: nn.Module, owner: Owner | None) -> None:
    """Make a layer of the torch backend what `owner` made of it; None: what it was before anybody swapped it."""
    layer_state = None if owner is None else owner.layer_state
    if isinstance(layer_state, ExpertsState):
        take_state(module, layer_state)
    elif STATE in vars(module):
        take_state(module, None)
    elif owner is None:
        module.__class__ = module.__dict__[ORIGINAL]
    elif layer_state is not None:
        module.__class__ = fp8_class(module.__dict__[ORIGINAL]) if layer_type(module) else Fp8Linear
        module.__dict__["layer_state"] = layer_state
        weight: Any = module.weight
        layer_state.settle(weight.device)
    else:
        module.__class__ = norms.form_of(module.__dict__[ORIGINAL])


class Turn:
    """Gives shared layers the form that one engine computes with, whenever its model runs.

    root       the engine's model
    fp8_state  its FP8 state; None for an engine without our sections
    modules    layers that other engines hold too, and modules that were compiled for one of them
    """

    _running: Turn | None = None
    """Whose model runs: the outermost one's, where one engine's model holds another's."""

    def __init__(self, root: nn.Module, fp8_state: ModelFp8State | None, modules: Sequence[nn.Module]):
        self.fp8_state = fp8_state
        self.modules = list(modules)
        root.register_forward_pre_hook(self._before, prepend=True)
        root.register_forward_hook(self._after, always_call=True)

    @opaque
    def _before(self, *_: Any) -> None:
        if Turn._running is None:
            Turn._running = self
            self._take()

    @opaque
    def _after(self, root: nn.Module, args: Any, output: Any) -> None:
        if Turn._running is not self:
            return
        Turn._running = None
        # The backward may run layers again (activation checkpointing), after another engine's forward.
        for tensor in tensors_of(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._take())

    def _take(self) -> None:
        for module in self.modules:
            owners = owners_of(module)
            if owners:
                take_form(module, next((owner for owner in owners if owner.fp8_state is self.fp8_state), None))
            take_forms(module, self.fp8_state)


def remove_turns(root: nn.Module, fp8_state: ModelFp8State | None) -> None:
    """Take the hooks of `Turn` off, by owner and not by handle: a copied model has hooks without handles."""
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key, hook in list(hooks.items()):
            turn = getattr(hook, "__self__", None)
            if isinstance(turn, Turn) and turn.fp8_state is fp8_state:
                del hooks[key]
