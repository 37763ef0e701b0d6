"""What a module touches of DeepSpeed's private names: declared in the module, read here without importing it.

A module of ds_fp8 that overrides, reads or writes something of a DeepSpeed object says so at its top:

    TOUCHED = {
        "ZeroStage12": touched(overrides="step", reads="bit16_groups overlap_comm", writes="bit16_groups"),
        "Parameter": touched(reads="ds_tensor", writes="data"),
    }

The key is the owner of the names (`OWNERS`), or several of them. `tests/zero/test_touched.py` compares declaration and
code in both directions; `check_instance` looks at the finished object; `ds_fp8 doctor --deepspeed` looks into the
source of a release. Adapters declare too; theirs count only for the releases that they serve. `deepspeed.comm` and
`deepspeed.accelerator` are public and need no declaration.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PrivateNameError
from ..releases import numbers
from .adapters import LINES

FP8, MSAMP = "fp8", "msamp"
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("checkpoint", "comm", "engine", "zero")
"""Packages of ds_fp8 that may touch DeepSpeed's objects."""

_SETS_PARAMETERS = (
    "deepspeed.runtime.zero.partition_parameters deepspeed.runtime.zero.stage_1_and_2 deepspeed.runtime.zero.stage3"
    " deepspeed.utils.tensor_fragment deepspeed.utils.mixed_precision_linkage deepspeed.runtime.zero.parameter_offload"
    " deepspeed.checkpoint.universal_checkpoint deepspeed.runtime.bf16_optimizer"
)

OWNERS: dict[str, tuple[str, str]] = {
    "Engine": ("deepspeed.runtime.engine", "DeepSpeedEngine"),
    "ZenFlow": ("deepspeed.runtime.zenflow.engine", ""),
    "PipelineEngine": ("deepspeed.runtime.pipe.engine", "PipelineEngine"),
    "ZeroOptimizer": ("deepspeed.runtime.base_optimizer", "ZeROOptimizer"),
    "ZeroStage12": ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
    "ZeroStage3": ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"),
    "Bf16": ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer"),
    "Stage0": ("deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer"),
    "GatheredParameters": ("deepspeed.runtime.zero.partition_parameters", "GatheredParameters"),
    "TensorFragment": ("deepspeed.utils.tensor_fragment", "tensor_fragment"),
    "CheckpointEngine": ("deepspeed.runtime.checkpoint_engine.checkpoint_engine", "CheckpointEngine"),
    "Coordinator": ("deepspeed.runtime.zero.partitioned_param_coordinator", "PartitionedParameterCoordinator"),
    "TorchAutocast": ("deepspeed.runtime.torch_autocast", ""),
    # What ZeRO hangs on parameters and their shares, wherever it does.
    "Parameter": (_SETS_PARAMETERS, ""),
}
"""Whose names they are -> module and class in DeepSpeed; no class: what the code of these modules hangs on objects."""

WRAPPERS = ("ZeroStage12", "ZeroStage3", "Bf16")


@dataclass(frozen=True)
class Touched:
    """Names of one owner.

    overrides  methods that a mixin or an instance attribute of ours stands in front of
    reads      attributes and methods that are read or called
    writes     attributes that are set; a renamed one would be set in vain, and nothing would tell
    later      of these, what DeepSpeed makes only with time, or with some settings: not looked for on a new object
    """

    overrides: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    later: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.overrides, *self.reads, *self.writes, *self.later))


def touched(overrides: str = "", reads: str = "", writes: str = "", later: str = "") -> Touched:
    """Names in words, separated by blanks."""
    return Touched(tuple(overrides.split()), tuple(reads.split()), tuple(writes.split()), tuple(later.split()))


@functools.cache
def of_file(file: Path) -> dict[str, Touched]:
    """`TOUCHED` of a source file, without importing it; {} when it declares nothing."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id == "TOUCHED" and isinstance(node.value, ast.Dict):
            found = {}
            for key, call in zip(node.value.keys, node.value.values, strict=True):
                assert key is not None and isinstance(call, ast.Call), f"{file}: TOUCHED is no plain dictionary"
                words = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
                found[ast.literal_eval(key)] = touched(**words)
            return found
    return {}


KNOWN_BY_TEXT = ("coordinator_stage3.py", "hooks_stage3.py", "module_hooks_stage3.py")
"""Files of code that runs only where DeepSpeed's text is a known one (`hooks_known.py`): more than its names says."""


def files(version: str | None = None) -> Iterator[Path]:
    """Source files that may touch DeepSpeed; of adapters, those that serve `version` (all when it is None)."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            if file.name in KNOWN_BY_TEXT:
                continue
            line = file.stem.removeprefix("until_").replace("_", ".") if file.stem.startswith("until_") else None
            if line not in LINES or version is None or numbers(version) <= numbers(line):
                yield file


def owners_of(owner: str) -> tuple[str, ...]:
    """The owners that a key names; `AnyWrapper` stands for each of ZeRO's and BF16's."""
    return tuple(one for word in owner.split() for one in (WRAPPERS if word == "AnyWrapper" else (word,)))


def declared(version: str) -> Iterator[tuple[str, str, str]]:
    """(file, owner, name) of everything declared for DeepSpeed `version`."""
    for file in files(version):
        for owner, names in of_file(file).items():
            for one in owners_of(owner):
                for name in sorted(names.names):
                    yield file.relative_to(ROOT).as_posix(), one, name


def imports(version: str) -> Iterator[tuple[str, str, str]]:
    """(file, module, name) of everything that is imported from DeepSpeed by name."""
    for file in files(version):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).startswith("deepspeed"):
                for one in node.names:
                    yield file.relative_to(ROOT).as_posix(), str(node.module), one.name


def check_instance(instance: Any, kind: str, base: type) -> None:
    """Raise PrivateNameError if something that the mixins of a specialised wrapper declare is not there.

    instance  the finished object
    kind      owner of the names, as `OWNERS`
    base      its class before, DeepSpeed's own
    """
    lacking = []
    order = type(instance).__mro__
    for position, cls in enumerate(order[: order.index(base)]):
        for owner, names in getattr(sys.modules.get(cls.__module__), "TOUCHED", {}).items():
            if kind not in owners_of(owner):
                continue
            needed = (n for n in (*names.reads, *names.writes) if n not in names.later)
            lacking += [(cls, n) for n in needed if not hasattr(instance, n)]
            # An adapter is there to bring what DeepSpeed lacks; all others stand in front of something.
            standing = [n for n in names.overrides if n in vars(cls)] if ".adapters." not in cls.__module__ else []
            lacking += [(cls, n) for n in standing if not any(n in vars(below) for below in order[position + 1 :])]
    if lacking:
        raise PrivateNameError(
            f"{base.__module__}.{base.__name__} of this DeepSpeed is not what ds_fp8 knows:\n"
            + "\n".join(f"  it has no {name}, which {cls.__module__} needs" for cls, name in dict.fromkeys(lacking))
            + "\n  `ds_fp8 doctor` lists all that differs."
        )
