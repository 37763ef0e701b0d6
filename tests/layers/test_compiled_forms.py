"""Modules that several engines' models hold are compiled for those that asked; what a script wrote stays."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
from torch import nn

from ds_fp8.layers.compiled_forms import CALL, FORMS, as_scripted, give_form, remove_forms, take_forms

FIRST, SECOND = (SimpleNamespace(name=name) for name in ("first", "second"))
LOSS = "_loss_function"


def module() -> nn.Module:
    found = nn.Linear(2, 2)
    found.__dict__[LOSS] = "the script's"
    give_form(found, FIRST, CALL, "call of the first")
    give_form(found, SECOND, CALL, "call of the second")
    give_form(found, FIRST, LOSS, "loss of the first")
    return found


def held(found: nn.Module) -> tuple:
    return found.__dict__.get(CALL), found.__dict__.get(LOSS)


@pytest.mark.parametrize("gone", [FIRST, SECOND, None], ids=["first", "second", "all"])
def test_each_engine_has_its_own(gone):
    found = module()
    expected = {
        "first": ("call of the first", "loss of the first"),
        "second": ("call of the second", "the script's"),
        "neither": (None, "the script's"),
    }
    for engine, name in ((FIRST, "first"), (SECOND, "second"), (None, "neither")):
        take_forms(found, engine)
        assert held(found) == expected[name]
        assert as_scripted(found, CALL) == () and as_scripted(found, LOSS) == ("the script's",)
    remove_forms(found, gone)
    left = {"first": "second", "second": "first"}.get(getattr(gone, "name", ""), "neither")
    assert held(found) == expected[left]
    assert (FORMS in vars(found)) == (gone is not None)
    remove_forms(found, None)
    assert held(found) == expected["neither"] and FORMS not in vars(found)


def test_what_a_script_writes_afterwards_stays():
    found = module()
    found.__dict__[CALL] = "the script's own compile"
    for change in (
        lambda: take_forms(found, FIRST),
        lambda: remove_forms(found, SECOND),
        lambda: remove_forms(found, None),
    ):
        change()
        assert found.__dict__[CALL] == "the script's own compile"


def test_a_copy_has_no_compiled_call_of_another_module():
    found = module()
    for copied in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert CALL not in vars(copied)
        take_forms(copied, vars(copied)[FORMS][0].fp8_state)
        assert held(copied) == (None, "loss of the first")
        remove_forms(copied, None)
        assert held(copied) == (None, "the script's")


def test_a_whole_model_stays_compiled_whoever_calls():
    """Its hooks, which tell whose turn it is, run inside of the compiled call."""
    found = nn.Linear(2, 2)
    give_form(found, FIRST, CALL, "call", is_whole=True)
    take_forms(found, SECOND)
    assert found.__dict__[CALL] == "call"
