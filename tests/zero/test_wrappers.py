"""The types that our mixins are checked with (`deepspeed_wrappers.pyi`) are DeepSpeed's: its names, its parameters."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator

import pytest

from ds_fp8.releases import DEEPSPEED
from ds_fp8.zero.private_names import METHODS
from ds_fp8.zero.touched import OWNERS, ROOT, files, of_file, owners_of

STUB = ROOT / "zero" / "deepspeed_wrappers.pyi"
OWNERS_THERE = ("ZeroStage12", "ZeroStage3", "Bf16", "Stage0")


@functools.cache
def classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)}


def typed(owner: str) -> dict[str, ast.stmt]:
    """name -> its declaration in the stub, those of its bases included."""
    cls, found = classes()[owner], {}
    for base in cls.bases:
        found |= typed(ast.unparse(base))
    for node in cls.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = node
    return found


def declared(owner: str, version: str | None = None) -> set[str]:
    """Names that modules say they touch of this owner in a release; in any with None."""
    return {
        name
        for file in files(version)
        for key, names in of_file(file).items()
        if owner in owners_of(key)
        for name in names.names
    }


@pytest.mark.parametrize("owner", OWNERS_THERE)
def test_a_name_is_typed_if_and_only_if_it_is_declared(owner):
    """All that the newest release is touched at, and nothing that no module touches; an adapter may touch older
    names.
    """
    assert declared(owner, DEEPSPEED[-1]) <= set(typed(owner)) <= declared(owner)


@pytest.mark.parametrize("owner", OWNERS_THERE)
def test_methods_have_deepspeeds_parameters(owner):
    """Parameter names, in order; `*args` stands for what differs between DeepSpeed's classes."""
    module, cls = OWNERS[owner]
    theirs = getattr(importlib.import_module(module), cls)
    for name, node in typed(owner).items():
        found = inspect.getattr_static(theirs, name, None)
        if not isinstance(node, ast.FunctionDef) or not inspect.isfunction(found):
            continue
        ours = [argument.arg for argument in node.args.args]
        given = list(inspect.signature(found).parameters)
        if given == ["args", "kwargs"]:
            continue  # decorated, for a profiler
        short = node.args.vararg is not None
        assert ours == (given[: len(ours)] if short else given), f"{owner}.{name}"


def overrides() -> Iterator[tuple[str, ast.FunctionDef]]:
    """(owner, method) of every mixin that stands in front of a method of the newest release."""
    for file in files(DEEPSPEED[-1]):
        for key, names in of_file(file).items():
            for cls in ast.parse(file.read_text()).body:
                for node in cls.body if isinstance(cls, ast.ClassDef) and cls.bases else ():
                    if isinstance(node, ast.FunctionDef) and node.name in names.overrides:
                        yield from ((owner, node) for owner in owners_of(key) if owner in OWNERS_THERE)


def test_a_mixin_takes_deepspeeds_parameters():
    """By the names that callers may give them; as `private_names.py` lists them, and is compared with DeepSpeed."""
    forms = {(method.owner, method.name): method.form_in(DEEPSPEED[-1]) for method in METHODS}
    found = [(owner, node) for owner, node in overrides() if (owner, node.name) in forms]
    assert len(found) > 40
    for owner, node in found:
        ours, form = [argument.arg for argument in node.args.args], list(forms[owner, node.name])
        short = node.args.vararg is not None
        assert ours == (form[: len(ours)] if short else form), f"{owner}.{node.name}"
