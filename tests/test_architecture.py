"""The floors of the house, held: a package imports only from floors below its own.

Read FLOORS from the top: it is the order in which a newcomer should read the code, and each package may be understood
with nothing but the ones above its line. The second table says where foreign libraries may be named, so that
`ds_fp8 check` never waits for torch, and DeepSpeed's private names stay where they are listed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ds_fp8

ROOT = Path(ds_fp8.__file__).parent

FLOORS = {
    "errors": 0,
    "formats": 0,
    "algorithms": 1,
    "experts": 1,
    "recipe": 1,
    "levels": 1,
    "capabilities": 1,
    "cost": 2,
    "releases": 0,
    "telemetry": 1,
    "config": 2,
    "numerics": 2,
    "plan": 3,
    "kernels": 3,
    "layers": 4,
    "comm": 4,
    "optim": 4,
    "zero": 5,
    "checkpoint": 5,
    "engine": 6,
    "import_hook": 7,
    "cli": 7,
    "run": 7,
    "compat": 7,
    "schemas": 0,
}

NAMED_ONLY_IN = {
    "torch": {
        "capabilities",
        "numerics",
        "plan",
        "kernels",
        "layers",
        "comm",
        "optim",
        "zero",
        "checkpoint",
        "engine",
        "cli",
        "compat",
    },
    # `schemas` holds, in an installed package, the script that reads its schema off DeepSpeed.
    "deepspeed": {"schemas", "comm", "zero", "checkpoint", "engine", "compat", "run", "cli"},
    "transformer_engine": {"layers", "capabilities", "cli"},
    "triton": {"kernels", "capabilities", "cli"},
    "jsonschema": {"config"},
    "plotly": {"cli"},
}
"""Library -> packages that may import it. Everyone else asks one of those."""

SIDEWAYS = {("checkpoint", "zero")}
"""Pairs on one floor of which the first may use the second. The three stations of floor 4 do not know each other."""


def package_of(file: Path) -> str:
    """`layers` for ds_fp8/layers/linear.py, `errors` for ds_fp8/errors.py, the empty string for ds_fp8/__init__.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports_of(file: Path) -> list[tuple[str, int]]:
    """Every absolute name that a file imports, also inside functions, as (dotted name, line)."""
    here = ("ds_fp8", *file.relative_to(ROOT).with_suffix("").parts)
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join((*here[: len(here) - node.level], *([node.module] if node.module else [])))
            if base == "ds_fp8":  # `from .. import config`: the name is the package
                found += [(f"ds_fp8.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append((base, node.lineno))
    return found


FILES = sorted(file for file in ROOT.rglob("*.py"))


def test_every_package_has_a_floor():
    """A new package says where it stands before it is used."""
    packages = {package_of(file) for file in FILES} - {""}
    assert packages <= FLOORS.keys(), f"no floor for {sorted(packages - FLOORS.keys())}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down_only(file):
    """Ours: from a lower floor, from the own package, or sideways where it is written down."""
    package = package_of(file)
    if not package:
        pytest.skip("ds_fp8/__init__.py is the hook itself")
    for name, line in imports_of(file):
        parts = name.split(".")
        if parts[0] != "ds_fp8" or len(parts) < 2 or parts[1] not in FLOORS:
            continue
        other = parts[1]
        allowed = other == package or FLOORS[other] < FLOORS[package] or (package, other) in SIDEWAYS
        # The import hook imports the engine, the people's floor may use itself.
        allowed = allowed or FLOORS[package] == FLOORS[other] == 7
        assert allowed, (
            f"{file.name}:{line}: {package} (floor {FLOORS[package]}) imports {other} (floor {FLOORS[other]})"
        )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_foreign_libraries_are_named_where_they_belong(file):
    """One package adapts one library; the others do not know that it exists."""
    package = package_of(file)
    for name, line in imports_of(file):
        library = name.split(".")[0]
        if library in NAMED_ONLY_IN:
            assert package in NAMED_ONLY_IN[library], f"{file.name}:{line}: {package} imports {library}"


@pytest.mark.parametrize("module", ["ds_fp8", "ds_fp8.levels", "ds_fp8.telemetry", "ds_fp8.config", "ds_fp8.engine"])
def test_light_floors_import_neither_torch_nor_deepspeed(module):
    """`ds_fp8 check` and the start of every Python pay for nothing they do not use."""
    code = (
        f"import {module}, sys; "
        "print(sorted({'torch', 'deepspeed', 'transformer_engine', 'triton'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert found.stdout.strip() == "[]"


def test_files_stay_small_enough_to_be_one_idea():
    """About 200 lines is a good size; beyond 400 a file holds two ideas."""
    long = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


def test_names_in_the_architecture_document_exist():
    """docs/architecture.md speaks of files and public names that are there."""
    checkout = Path(__file__).resolve().parents[1]
    text = (checkout / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text))
    missing = sorted(file for file in files if not ((ROOT / file).is_file() or (checkout / file).is_file()))
    assert len(files) > 40 and missing == []
    packages = "|".join(FLOORS)
    names = set(re.findall(rf"(?<![\w.])((?:{packages})\.(?!py\b)[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)", text))
    assert len(names) > 40 and sorted(name for name in names if not exists(f"ds_fp8.{name}")) == []


def exists(name: str) -> bool:
    """Whether the dotted `name` can be imported, or is an attribute or a dataclass field of what can."""
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(name) is not None:
            return True
    holder, _, attribute = name.rpartition(".")
    try:
        found = importlib.import_module(holder)
    except ModuleNotFoundError:
        above, _, last = holder.rpartition(".")
        found = getattr(importlib.import_module(above), last, None)
    return hasattr(found, attribute) or attribute in getattr(found, "__dataclass_fields__", {})


def test_only_its_own_module_asks_for_a_recipes_name():
    """What differs by recipe stands in its entry (`recipe.RECIPE_KINDS`) and in its file; nobody compares its name."""
    from ds_fp8.recipe import RECIPES

    found = []
    for path in ROOT.rglob("*.py"):
        if path.parent.name == "recipes":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                asked = {
                    constant.value
                    for side in (node.left, *node.comparators)
                    for constant in ast.walk(side)
                    if isinstance(constant, ast.Constant)
                }
                if asked & set(RECIPES) and "scale_extent" not in ast.unparse(node):  # `block` is an extent, too
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert not found


MAKERS = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros"}


def made_without(key: str, makers: set[str]) -> list[str]:
    """Calls of these functions of torch that leave `key` to a default."""
    nameless = []
    for file in FILES:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            made_by_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
            if made_by_torch and call.func.attr in makers and not {key, None} & {one.arg for one in call.keywords}:
                nameless.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    return nameless


def test_new_tensors_name_their_dtype():
    """A script may set another default (`torch.set_default_dtype`): a buffer that a kernel fills as fp32 would be half
    as long.
    """
    assert not made_without("dtype", MAKERS), "dtype=... is missing"


def test_new_tensors_name_their_device():
    """A script may set another default (`torch.set_default_device`): a C++ kernel would be given a GPU's address, and
    pinned memory is the host's. `torch.as_tensor` moves a tensor there.
    """
    makers = MAKERS | {"arange", "as_tensor", "asarray", "empty_strided", "randint", "randperm"}
    assert not made_without("device", makers), "device=... is missing"
