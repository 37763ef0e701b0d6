"""Obeying the plan: modules are swapped in place, and can be given back.

The torch backend changes the class of a module and touches nothing else. Transformer Engine needs objects of its own:
they take the old module's Parameters, hooks, buffers, flags and attributes, and its place in every parent and in
DeepSpeed's `PipelineModule.forward_funcs`, which holds modules directly.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import BackendError, DsFp8Error
from ..plan import ModuleDecision, Plan
from ..plan.shapes import DENSE, LAYER_TYPES
from . import experts, fp8_linear, matrix_layer, norms
from .as_original import ORIGINAL, show_home
from .blocks import compile_blocks, release_blocks
from .experts_state import STATE as EXPERTS_STATE
from .fp8_state import ModelFp8State
from .fused import fuse_layers
from .owners import OWNERS, Owner, remove_turns, take_form

ROOT_STATE = "_ds_fp8_state"
"""Attribute of the root that holds its FP8 state."""

OWN = "_ds_fp8_own"
"""Attribute of a replacement that names the attributes it was built with."""

CARRIED = (
    "_buffers",
    "_non_persistent_buffers_set",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""What nn.Module keeps of its own and a replacement must take over; the dictionaries are shared, so that handles that
callers hold (`handle.remove()`) go on working."""


def swap_layers(
    model: nn.Module, plan: Plan, *, group: Any = None, by_engine: bool = False, managed: bool | None = None
) -> ModelFp8State:
    """Make the layers that `plan` names FP8 layers, with the same Parameter objects. Returns their FP8 state.

    group      process group whose ranks share one amax history (`reduce_amax`); None is the whole world
    by_engine  a DeepSpeed engine does it by its JSON: the next engine of this model may undo it (see `owners.py`)
    managed    the caller will call the FP8 state's `update_scales` once per optimizer step, as an engine does;
               otherwise the scales are updated before each forward of `model`, by this rank alone. None: as `by_engine`
    Raises BackendError when the model is not the one that was planned, or a backend refuses a layer; the model is then
    as it was.
    """
    if ROOT_STATE in vars(model):
        raise BackendError("this model has FP8 layers already; call restore_layers(model) first.")
    names = [decision.fqn for decision in plan.swaps if decision.kind in DENSE]
    fp8_state = ModelFp8State(names, plan.fp8, group=group, managed=by_engine if managed is None else managed)
    try:
        for decision in plan.swaps:
            _swap(model, decision, plan, fp8_state, by_engine)
        if plan.fp8.fuse:
            fuse_layers(model, plan)
        if plan.fp8.compile is not None:
            compile_blocks(model, plan.fp8.compile, {decision.fqn for decision in plan.swaps}, fp8_state)
    except DsFp8Error:
        restore_layers(model, fp8_state)  # those of other engines, whose models this one holds, stay theirs
        release_blocks(model, fp8_state)
        raise
    model.__dict__[ROOT_STATE] = fp8_state
    fp8_state.watch(model)
    return fp8_state


def restore_layers(model: nn.Module, fp8_state: ModelFp8State | None = None) -> nn.Module:
    """Give `model` its unmodified layers back, in place: the same Parameters, the same names. Returns `model`.

    fp8_state  only what belongs to this one; a layer that another engine shares stays with that one. None: everything
    """
    for module in list(model.modules()):
        owners = vars(module).get(OWNERS, [])
        left = [owner for owner in owners if fp8_state is not None and owner.fp8_state is not fp8_state]
        if owners and not left:
            restore(model, module)
        elif len(left) < len(owners):
            give(module, left)
    for root in list(model.modules()):
        own = vars(root).get(ROOT_STATE)
        if own is not None and (fp8_state is None or own is fp8_state):
            del root.__dict__[ROOT_STATE]
            own.unwatch(root)
            remove_turns(root, own)
            release_blocks(root, own)
    return model


def restore(model: nn.Module, module: nn.Module) -> None:
    """One layer unmodified again, whoever owns it."""
    if OWN in vars(module):
        _replace(model, module, _restore_foreign(module))
    elif EXPERTS_STATE in vars(module):
        experts.restore(module)
    elif "layer_state" in vars(module):
        fp8_linear.restore(module)  # type: ignore[arg-type]
    else:
        norms.restore(module)
    module.__dict__.pop(OWNERS, None)


def give(module: nn.Module, owners: list[Owner]) -> None:
    """Make `owners` the owners of a layer of the torch backend; it takes the form of the last one."""
    module.__dict__[OWNERS] = owners
    show_home(module)
    take_form(module, owners[-1])


def _swap(model: nn.Module, decision: ModuleDecision, plan: Plan, fp8_state: ModelFp8State, by_engine: bool) -> None:
    try:
        module = model.get_submodule(decision.fqn)
    except AttributeError as error:
        raise BackendError(f"the plan swaps {decision.fqn}, which this model does not have; plan again.") from error
    layer_state = fp8_state.layer_state(decision.fqn) if decision.kind in DENSE else None
    if decision.kind == "Experts":
        module.__dict__[OWNERS] = [Owner(fp8_state, experts.convert(module, decision, fp8_state), by_engine)]
        return
    owners = [Owner(fp8_state, layer_state, by_engine)]
    if decision.kind in LAYER_TYPES:
        matrix_layer.convert(module, fp8_state.layer_state(decision.fqn))
        module.__dict__[OWNERS] = owners
        return
    if plan.fp8.backend == "torch" or (layer_state is None and norms.is_library(module)):
        if layer_state is not None:
            fp8_linear.convert(module, layer_state)  # type: ignore[arg-type]
        else:
            norms.convert(module, decision.kind)
        module.__dict__[OWNERS] = owners
        show_home(module)
        return
    if module is model:
        raise BackendError(
            "the model itself is one layer, which cannot be replaced by Transformer Engine's; use backend torch."
        )
    _replace(model, module, _make_foreign(module, decision, fp8_state, owners))


def _make_foreign(
    module: nn.Module, decision: ModuleDecision, fp8_state: ModelFp8State, owners: list[Owner]
) -> nn.Module:
    from .slot_state import SlotState
    from .transformer_engine.linear import make_linear
    from .transformer_engine.names import load
    from .transformer_engine.norms import make_norm
    from .transformer_engine.scaling import make_recipe

    if decision.kind != "Linear":
        new = make_norm(module)
    else:
        scaling = make_recipe(load(), fp8_state.recipe)
        layer_state = fp8_state.layer_state(decision.fqn)
        new = make_linear(module, SlotState(layer_state, module.weight, scaling))  # type: ignore[arg-type]
        new.__dict__["layer_state"] = layer_state
    new.__dict__[ORIGINAL] = type(module)
    new.__dict__[OWNERS] = owners
    new.__dict__[OWN] = frozenset(vars(new)) | {OWN}
    return new


def _restore_foreign(module: nn.Module) -> nn.Module:
    from .transformer_engine.linear import restore_linear
    from .transformer_engine.norms import restore_norm

    return restore_linear(module) if "layer_state" in vars(module) else restore_norm(module)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is, with everything that callers may have hung on `old`."""
    for name in CARRIED:
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]
    own = vars(old).get(OWN, frozenset())  # what a Transformer Engine layer has for itself stays with it
    for name, value in vars(old).items():
        if name not in new.__dict__ and name not in own:
            new.__dict__[name] = value
    new.training = old.training
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
        functions = vars(parent).get("forward_funcs")
        if isinstance(functions, list):
            functions[:] = [new if function is old else function for function in functions]
