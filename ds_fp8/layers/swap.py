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
from . import fp8_linear, norms
from .fused import fuse_layers
from .scale_book import ScaleBook

BOOK = "_ds_fp8_book"
"""Attribute of the root that holds its book."""

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


def swap_layers(model: nn.Module, plan: Plan, *, group: Any = None) -> ScaleBook:
    """Make the layers that `plan` names FP8 layers, with the same Parameter objects. Returns their scale book.

    group  process group whose ranks share one amax history (`reduce_amax`); None is the whole world
    Raises BackendError when the model is not the one that was planned, or a backend refuses a layer; the model is then
    as it was.
    """
    if BOOK in vars(model):
        raise BackendError("this model has FP8 layers already; call restore_layers(model) first.")
    names = [decision.fqn for decision in plan.swaps if decision.kind == "Linear"]
    book = ScaleBook(names, plan.fp8, group=group)
    try:
        for decision in plan.swaps:
            _swap(model, decision, plan, book)
        if plan.fp8.fuse:
            fuse_layers(model, plan)
    except DsFp8Error:
        restore_layers(model)
        raise
    model.__dict__[BOOK] = book
    book.watch(model)
    return book


def restore_layers(model: nn.Module) -> nn.Module:
    """Give `model` its plain layers back, in place: the same Parameters, the same names. Returns `model`."""
    book = vars(model).pop(BOOK, None)
    if book is not None:
        book.unwatch(model)
    for module in list(model.modules()):
        if isinstance(module, fp8_linear.Fp8Linear):
            fp8_linear.release(module)
        elif isinstance(module, tuple(norms.CLASSES.values())):
            norms.release(module)
        elif fp8_linear.ORIGINAL in vars(module):
            _replace(model, module, _restore_foreign(module))
    return model


def _swap(model: nn.Module, decision: ModuleDecision, plan: Plan, book: ScaleBook) -> None:
    try:
        module = model.get_submodule(decision.fqn)
    except AttributeError as error:
        raise BackendError(f"the plan swaps {decision.fqn}, which this model does not have; plan again.") from error
    if plan.fp8.backend == "torch":
        if decision.kind == "Linear":
            fp8_linear.adopt(module, book.page(decision.fqn))  # type: ignore[arg-type]
        else:
            norms.adopt(module, decision.kind)
        return
    if module is model:
        raise BackendError(
            "the model itself is one layer, which cannot be replaced by Transformer Engine's; use backend torch."
        )
    _replace(model, module, _make_foreign(module, decision, book))


def _make_foreign(module: nn.Module, decision: ModuleDecision, book: ScaleBook) -> nn.Module:
    from .page_state import PageState
    from .transformer_engine.linear import make_linear
    from .transformer_engine.names import load
    from .transformer_engine.norms import make_norm
    from .transformer_engine.scaling import make_recipe

    if decision.kind != "Linear":
        new = make_norm(module)
    else:
        scaling = make_recipe(load(), book.recipe)
        new = make_linear(module, PageState(book.page(decision.fqn), module.weight, scaling))  # type: ignore[arg-type]
        new.__dict__["page"] = book.page(decision.fqn)
    new.__dict__[fp8_linear.ORIGINAL] = type(module)
    new.__dict__[OWN] = frozenset(vars(new)) | {OWN}
    return new


def _restore_foreign(module: nn.Module) -> nn.Module:
    from .transformer_engine.linear import restore_linear
    from .transformer_engine.norms import restore_norm

    return restore_linear(module) if "page" in vars(module) else restore_norm(module)


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
