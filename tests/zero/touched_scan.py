"""What the code of ds_fp8 touches of DeepSpeed, read off its syntax tree; `test_touched.py` compares it with `TOUCHED`.

A name counts as DeepSpeed's
    on something that is known to be DeepSpeed's (`self` in a mixin, `engine`, a parameter): always, unless it is
    torch's elsewhere: when one of DeepSpeed's classes has it and neither we nor torch nor Python's own types do in a
    string: when it is the name of a method of the engine or of a wrapper, as in setattr(engine, "save_checkpoint", ...)
"""

from __future__ import annotations

import ast
import functools
import pathlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ds_fp8.zero import specializing
from ds_fp8.zero.deepspeed_source import DeepSpeedSource
from ds_fp8.zero.states_stage0 import Stage0Optimizer
from ds_fp8.zero.touched import OWNERS, ROOT, WRAPPERS, files

ENGINES = {"engine", "fp8_engine", "deepspeed_engine"}
OPTIMIZERS = {"zero_optimizer", "wrapper", "fp8_wrapper"}
PARAMETERS = {"param", "one", "lp", "share", "ds_tensor", "_hp_mapping", "fragment"}
KEYS = {"dynamic_loss_scale"}
"""Methods of DeepSpeed whose names are also keys of its checkpoints."""

READERS = {"checkpoint_engine", "reader"}
PYTHON = set().union(*(dir(kind) for kind in (dict, list, str, set, tuple, pathlib.Path, int, re.Match, ast.AST)))
TORCH = set(dir(torch.Tensor)) | set(dir(torch)) | set(dir(torch.nn.Module())) | set(dir(torch.nn.Parameter))
TORCH |= set(dir(torch.optim.SGD([torch.zeros(1)]))) | {"is_cuda", "grad", "data"}


@functools.cache
def owners() -> dict[str, set[str]]:
    """Owner -> its names in the installed DeepSpeed."""
    source = DeepSpeedSource.installed()
    found = {}
    for owner, (module, cls) in OWNERS.items():
        found[owner] = source.attributes(module, cls) if cls else source.hung_on(*module.split())
    return found


@functools.cache
def mixins() -> dict[str, set[str]]:
    """Our class -> owners whose instances it becomes a part of; adapters by their names."""
    found: dict[str, set[str]] = {}
    rows = [(row.kind, cls) for row in specializing.SERVED for cls in (row.states, row.gradients, row.weights)]
    for kind, mixin in [*rows, ("Stage0", Stage0Optimizer)]:
        for cls in mixin.__mro__ if mixin is not None else ():
            if cls.__module__.startswith("ds_fp8"):
                found.setdefault(cls.__name__, set()).add(kind)
    for kind in (*WRAPPERS, "Stage0"):
        found.setdefault(kind, set()).add(kind)
    return found


@functools.cache
def ours() -> set[str]:
    """Names that ds_fp8 itself defines outside of mixins."""
    found: set[str] = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.name not in mixins():
                for inner in ast.walk(node):
                    if isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
                        found.add(inner.name)
                    elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                        found.add(inner.target.id)
                    elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                        found.add(inner.attr)
            elif isinstance(node, ast.FunctionDef):
                found.add(node.name)
    return found


@functools.cache
def of_mixins() -> set[str]:
    """Names that mixins and adapters define themselves."""
    found: set[str] = set()
    for file in files():
        for cls in ast.walk(ast.parse(file.read_text())):
            if isinstance(cls, ast.ClassDef) and cls.name in mixins():
                for node in cls.body:
                    if isinstance(node, ast.FunctionDef):
                        found.add(node.name)
                    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                        found.add(node.target.id)
                    elif isinstance(node, ast.Assign):
                        found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def last_name(node: ast.AST) -> str:
    """`engine` of `self.engine`, of `engine` and of `engine()`; `super()` is self."""
    if isinstance(node, ast.Call):
        return "self" if last_name(node.func) == "super" else last_name(node.func)
    if isinstance(node, ast.Subscript):
        return last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@functools.cache
def scan(file: Path) -> list[tuple[str, str, str, int]]:
    return list(_scan(file))


def _scan(file: Path) -> Iterator[tuple[str, str, str, int]]:
    """(owner, kind, name, line) of everything that `file` touches; kind is overrides, reads, writes or text."""
    if file.name == "private_names.py":
        return  # it lists names, and touches nothing
    tree = ast.parse(file.read_text())
    inside = {id(node): cls.name for cls in ast.walk(tree) if isinstance(cls, ast.ClassDef) for node in ast.walk(cls)}
    skipped = {id(part) for node in tree.body if _is_declaration(node) for part in ast.walk(node)}
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and n.body and isinstance(n.body[0], ast.Expr)}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in skipped or id(node) in docs:
            continue
        cls = inside.get(id(node), "")
        if isinstance(node, ast.Attribute):
            found = owner_of(node.attr, last_name(node.value), cls, is_self=last_name(node.value) == "self")
            if found:
                yield found, "writes" if not isinstance(node.ctx, ast.Load) else "reads", node.attr, node.lineno
        elif isinstance(node, ast.FunctionDef) and cls in mixins() and not node.name.startswith("__"):
            kinds = [kind for kind in sorted(mixins()[cls]) if node.name in owners()[kind]]
            if kinds:
                yield (kinds[0] if len(mixins()[cls]) == 1 else "AnyWrapper"), "overrides", node.name, node.lineno
        elif isinstance(node, ast.Call) and last_name(node.func) in ("getattr", "setattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            found = (
                owner_of(name, last_name(node.args[0]), cls, is_self=last_name(node.args[0]) == "self") if name else ""
            )
            if found:
                yield found, "text", name, node.lineno
        elif isinstance(node, ast.Constant) and node.value in _methods() - KEYS:
            yield "Engine" if node.value in owners()["Engine"] else "AnyWrapper", "text", node.value, node.lineno


def _is_declaration(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Assign, ast.AnnAssign)) and "TOUCHED" in ast.unparse(node).partition("=")[0]


@functools.cache
def _methods() -> set[str]:
    """Methods by whose name nobody else goes."""
    source = DeepSpeedSource.installed()
    names: set[str] = set()
    for owner in ("Engine", "ZeroStage12", "ZeroStage3", "Bf16"):
        found = source.find(*OWNERS[owner])
        names |= {node.name for node in found.body if isinstance(node, ast.FunctionDef)}
    return {n for n in names if "_" in n and not n.startswith("__")} - TORCH - PYTHON


def owner_of(name: str, on: str, cls: str, *, is_self: bool) -> str:
    """Whose name it is; empty when it is nobody's of DeepSpeed."""
    if name.startswith(("fp8_", "_fp8_", "__", "FP8_")):
        return ""
    if is_self and cls in mixins():
        kinds = mixins()[cls]
        if name in of_mixins() and not any(name in owners()[kind] for kind in kinds):
            return ""
        return next(iter(kinds)) if len(kinds) == 1 else "AnyWrapper"
    # A function with `self` outside of a class becomes a method: of the engine, or of a parameter.
    if on in ENGINES or (is_self and not cls and name in owners()["Engine"] - {"device"}):
        return "PipelineEngine" if name in owners()["PipelineEngine"] - owners()["Engine"] else "Engine"
    if on in OPTIMIZERS and any(name in owners()[kind] for kind in WRAPPERS):
        return "AnyWrapper"
    if on in READERS:
        return "CheckpointEngine"
    if name in TORCH:
        return ""
    if on in PARAMETERS and name in owners()["TensorFragment"] - owners()["Parameter"]:
        return "TensorFragment"
    if on in PARAMETERS and name in owners()["Parameter"]:
        return "Parameter"
    if name in PYTHON or name in ours():
        return ""
    return next((owner for owner, names in owners().items() if name in names), "")


def suggestion(file: Path) -> str:
    """`TOUCHED` as the code of `file` would have it, for pasting; kinds and owners are for a person to check."""
    found: dict[str, dict[str, set[str]]] = {}
    for owner, kind, name, _ in scan(file):
        found.setdefault(owner, {}).setdefault("reads" if kind == "text" else kind, set()).add(name)
    lines = ["TOUCHED = {"]
    for owner, kinds in sorted(found.items()):
        words = ", ".join(f'{kind}="{" ".join(sorted(names))}"' for kind, names in sorted(kinds.items()))
        lines.append(f'    "{owner}": touched({words}),')
    return "\n".join([*lines, "}"])


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        print(suggestion(Path(argument).resolve()))
