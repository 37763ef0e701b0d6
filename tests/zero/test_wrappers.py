"""The types that our mixins are checked with (`deepspeed_wrappers.pyi`) are DeepSpeed's: its names, its parameters."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect

import pytest

from ds_fp8.releases import DEEPSPEED
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
