"""Whose compiled form a module has: that of the engine whose turn it is (`owners.py`).

`fp8.compile` writes three attributes: how a block is called, what it checkpoints with, the loss that a model calls. A
module that several engines' models hold is compiled for those that asked, and as its script made it for the others: an
engine that comes or goes takes only its own forms with it. What a script writes there afterwards stays.

Forms lie in the module's `__dict__`, so copies and pickles carry them, with FP8 states of their own; but no copy has a
compiled call, which torch leaves out (`nn.Module.__getstate__`) because it would run the module that was copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

FORMS = "_ds_fp8_compiled"
"""Attribute of a module that was compiled here: its forms, in the order in which their engines came."""

CALL = "_compiled_call_impl"
"""Where `nn.Module.compile` keeps what a call of the module runs."""

Held = tuple[Any, ...]
"""What an attribute holds: (value,), or () where there is none in the module itself."""


@dataclass(eq=False)
class CompiledForm:
    """One attribute of a module as one engine wants it.

    fp8_state  the FP8 state of the engine
    place      name of the attribute
    before     what the script had there
    is_whole   the call of a whole model, which is compiled whoever calls: its hooks run when it has begun
    """

    fp8_state: Any
    place: str
    value: Any
    before: Held
    is_whole: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        value = None if self.place == CALL else self.value
        return CompiledForm, (self.fp8_state, self.place, value, self.before, self.is_whole)


def forms_of(module: nn.Module) -> list[CompiledForm]:
    """Empty for a module that was not compiled here."""
    return vars(module).get(FORMS, [])


def as_scripted(module: nn.Module, place: str) -> Held:
    """What `place` held, or holds, without us."""
    found = _held(module, place)
    ours = [form for form in forms_of(module) if form.place == place]
    return ours[0].before if any(found and found[0] is form.value for form in ours) else found


def give_form(
    module: nn.Module, fp8_state: Any, place: str, value: Any, *, before: Held | None = None, is_whole: bool = False
) -> None:
    """Put `value` there for the engine of `fp8_state`, whose turn it is; before: where that has happened already."""
    before = as_scripted(module, place) if before is None else before
    module.__dict__[FORMS] = [*forms_of(module), CompiledForm(fp8_state, place, value, before, is_whole)]
    _write(module, place, (value,))


def take_forms(module: nn.Module, fp8_state: Any) -> None:
    """The module as the engine of `fp8_state` has it; None: an engine without our sections."""
    for form in forms_of(module):
        if not form.is_whole and _is_ours(module, form.place):
            own = [one for one in forms_of(module) if one.place == form.place and one.fp8_state is fp8_state]
            _write(module, form.place, (own[0].value,) if own else form.before)


def remove_forms(module: nn.Module, fp8_state: Any | None) -> None:
    """Forget the forms of the engine of `fp8_state`; None: all. Another engine's that is left is taken."""
    forms = forms_of(module)
    left = [form for form in forms if fp8_state is not None and form.fp8_state is not fp8_state]
    for place in {form.place: None for form in forms}:
        if _is_ours(module, place):
            others = [form for form in left if form.place == place]
            _write(module, place, (others[-1].value,) if others else as_scripted(module, place))
    if left:
        module.__dict__[FORMS] = left
    else:
        module.__dict__.pop(FORMS, None)


def _is_ours(module: nn.Module, place: str) -> bool:
    """Neither of these: a script has written another value since."""
    found = _held(module, place)
    ours = [form for form in forms_of(module) if form.place == place]
    known: list[Held] = [held for form in ours for held in ((form.value,), form.before)]
    return any([id(value) for value in found] == [id(value) for value in held] for held in known)


def _held(module: nn.Module, place: str) -> Held:
    return (module.__dict__[place],) if place in module.__dict__ else ()


def _write(module: nn.Module, place: str, held: Held) -> None:
    if held:
        module.__dict__[place] = held[0]
    else:
        module.__dict__.pop(place, None)
