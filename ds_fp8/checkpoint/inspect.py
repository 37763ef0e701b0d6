"""Look before you load: every file of this rank is read and judged while the engine is still untouched.

DeepSpeed loads the module first, the optimizer afterwards, and learns only then that a shard is truncated, belongs to
another world size or to another stage; by that time the weights are gone. A run that falls back to an older checkpoint,
or asks its user, needs the engine as it was. So each rank reads its files first; the verdicts are exchanged, and either
all ranks go on (with the files already in memory: nothing is read twice) or all raise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import (
    FP32_FLAT_GROUPS,
    GROUP_PADDINGS,
    OPTIMIZER_STATE_DICT,
    PARTITION_COUNT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    ZERO_STAGE,
)

from ..errors import CheckpointError
from ..zero.states import KEY, check_codes
from ..zero.states_stage0 import Stage0Optimizer
from ..zero.states_stage0_formats import read_state

UNIVERSAL_CURE = (
    "  Convert it with `python -m deepspeed.checkpoint.ds_to_universal --input_folder DIR/TAG --output_folder DIR/TAG_universal`"
    ' and load that with "checkpoint": {"load_universal": true}.'
)


def load_checkpoint(
    original: Callable,
    engine: Any,
    load_dir: Any,
    tag: Any = None,
    *args: Any,
    check_client_state: Callable[[Any, str], None] | None = None,
    **kwargs: Any,
) -> Any:
    """DeepSpeed's load_checkpoint (`original`, bound to the engine) after `inspect` has found nothing wrong."""
    names = ("load_module_strict", "load_optimizer_states", "load_lr_scheduler_states", "load_module_only")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    with_optimizer = given.get("load_optimizer_states", True) and not given.get("load_module_only", False)
    with _model_files_of_any_stage(engine):
        files = inspect(engine, load_dir, tag, with_optimizer=with_optimizer, check_client_state=check_client_state)
        with _already_read(engine, files):
            return original(load_dir, tag, *args, **kwargs)


def inspect(
    engine: Any,
    load_dir: Any,
    tag: Any = None,
    *,
    with_optimizer: bool = True,
    check_client_state: Callable[[Any, str], None] | None = None,
) -> dict[str, Any]:
    """Read and judge this rank's files; {path: content} of what was read. Collective.

    CheckpointError on all ranks if any rank finds a fault. A checkpoint that is not there is DeepSpeed's to report.
    """
    files: dict[str, Any] = {}
    problem = None
    try:
        tag = _tag(engine, load_dir, tag)
        if tag is not None:
            _inspect_model(engine, load_dir, tag, files, with_optimizer, check_client_state)
            if with_optimizer:
                _inspect_optimizer(engine, load_dir, tag, files)
    except CheckpointError as error:
        problem = str(error)
    _raise_together(problem)
    return files


def _tag(engine: Any, load_dir: Any, tag: Any) -> str | None:
    if tag is not None:
        return str(tag)
    latest = Path(load_dir) / ("latest_universal" if engine.load_universal_checkpoint() else "latest")
    return latest.read_text().strip() if latest.is_file() else None


def _inspect_model(
    engine: Any,
    load_dir: Any,
    tag: str,
    files: dict[str, Any],
    with_optimizer: bool,
    check_client_state: Callable[[Any, str], None] | None,
) -> None:
    names = engine._get_all_ckpt_names(load_dir, tag)
    if len(names) != 1 or not Path(names[0]).is_file():
        return  # several model-parallel files are merged by DeepSpeed; a missing one it reports itself
    state = files[names[0]] = _read(engine, names[0])
    if not isinstance(state, dict) or "module" not in state:
        raise CheckpointError(f"{names[0]}: no model state of DeepSpeed.")
    if check_client_state is not None:
        check_client_state(state.get(KEY), names[0])
    optimizer = engine.optimizer
    if with_optimizer and isinstance(optimizer, Stage0Optimizer):
        saved = state.get("optimizer")
        if saved is None:
            raise CheckpointError(
                f"{names[0]}: no optimizer state, as ZeRO stages keep theirs in files of their own.\n{UNIVERSAL_CURE}"
                "\n  Or load the weights alone with load_optimizer_states=False."
            )
        read_state(optimizer, saved)
        check_codes(saved.get(KEY), names[0])


def _inspect_optimizer(engine: Any, load_dir: Any, tag: str, files: dict[str, Any]) -> None:
    if not engine.zero_optimization():
        return
    if engine.load_universal_checkpoint():
        _inspect_universal(engine, Path(load_dir) / tag)
        return
    path = engine._get_zero_ckpt_name(load_dir, tag)
    shards = sorted(Path(path).parent.glob("*_optim_states.pt"))
    if not Path(path).is_file():
        if shards:
            raise CheckpointError(
                f"{path}: not there, though {len(shards)} optimizer shards are: another world size or base dtype.\n{UNIVERSAL_CURE}"
            )
        return
    content = files[path] = _read(engine, path)
    shard = content.get(OPTIMIZER_STATE_DICT) if isinstance(content, dict) else None
    if not isinstance(shard, dict):
        raise CheckpointError(f"{path}: no optimizer shard of DeepSpeed.")
    check_codes(shard.get(KEY), path)
    _check_layout(engine, shard, path)


def _check_layout(engine: Any, shard: dict[str, Any], path: str) -> None:
    """Stage, world size and sizes, as far as DeepSpeed's shard tells them."""
    stage = int(engine.zero_optimization_stage())
    saved_stage = int(shard.get(ZERO_STAGE, stage))
    if (saved_stage == 3) != (stage == 3):
        raise CheckpointError(
            f"{path}: written in ZeRO stage {saved_stage}, this job is stage {stage}.\n{UNIVERSAL_CURE}"
        )
    optimizer = engine.optimizer
    world_size = dist.get_world_size(group=optimizer.dp_process_group)
    count = shard.get(PARTITION_COUNT)
    count = max(count) if isinstance(count, (list, tuple)) else count
    if isinstance(count, int) and count != world_size:
        raise CheckpointError(
            f"{path}: written by {count} data-parallel ranks, this job has {world_size}.\n{UNIVERSAL_CURE}"
        )
    flats = shard.get(FP32_FLAT_GROUPS) if stage == 3 else shard.get(SINGLE_PARTITION_OF_FP32_GROUPS)
    masters = getattr(optimizer, "fp8_masters", None)
    if flats is None or masters is None:
        return
    if len(flats) != len(masters):
        raise CheckpointError(
            f"{path}: {len(flats)} partitions, this job has {len(masters)}: another model or grouping."
        )
    paddings = shard.get(GROUP_PADDINGS) or [0] * len(flats)
    for index, (flat, padding, master) in enumerate(zip(flats, paddings, masters, strict=True)):
        saved = flat.numel() + (padding if stage != 3 and flat.numel() != master.numel() else 0)
        if saved != master.numel():
            raise CheckpointError(
                f"{path}: partition {index} has {flat.numel()} elements, this job's has {master.numel()}: another model."
            )


def _inspect_universal(engine: Any, folder: Path) -> None:
    """Every parameter of this rank has its three files. They are read one by one when they are loaded."""
    if not (folder / "zero" / "optimizer_state.pt").is_file():
        raise CheckpointError(f"{folder}: no universal checkpoint (zero/optimizer_state.pt is missing).")
    missing = [
        f"{name}/{key}.pt"
        for param, name in engine.param_names.items()
        if param.requires_grad
        for key in ("fp32", "exp_avg", "exp_avg_sq")
        if not (folder / "zero" / name / f"{key}.pt").is_file()
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{folder}/zero lacks {', '.join(missing[:3])}{more}: another model, or a broken conversion."
        )


def _read(engine: Any, path: str) -> Any:
    try:
        return engine.checkpoint_engine.load(path, map_location="cpu")
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). Truncated or no checkpoint; use an older tag."
        ) from error


def _raise_together(problem: str | None) -> None:
    problems: list[str | None] = [problem]
    if dist.is_initialized() and dist.get_world_size() > 1:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if problem is not None:
        raise CheckpointError(problem)
    for rank, other in enumerate(problems):
        if other is not None:
            raise CheckpointError(f"rank {rank}: {other}")


@contextmanager
def _model_files_of_any_stage(engine: Any) -> Iterator[None]:
    """Let a universal checkpoint load in another stage than it was converted from.

    Stage 3 names its model files `zero_pp_rank_0_mp_rank_00...`, stages 1 and 2 `mp_rank_00...`, and each looks for its own
    name only. For a universal checkpoint the file holds counters and schedulers, no weights: either will do.
    """
    if not engine.load_universal_checkpoint():
        yield
        return
    original = engine._get_all_ckpt_names

    def names(checkpoints_path: Any, tag: Any) -> list[str]:
        found = original(checkpoints_path, tag)
        folder = Path(checkpoints_path) / str(tag)
        patterns = ("mp_rank_*_model_states.pt", "zero_pp_rank_0_mp_rank_*_model_states.pt")
        return found or next((sorted(map(str, folder.glob(p))) for p in patterns if any(folder.glob(p))), [])

    engine.__dict__["_get_all_ckpt_names"] = names
    try:
        yield
    finally:
        del engine.__dict__["_get_all_ckpt_names"]


@contextmanager
def _already_read(engine: Any, files: dict[str, Any]) -> Iterator[None]:
    """DeepSpeed gets each file that `inspect` has read from memory, once; all others from disk."""
    reader = engine.checkpoint_engine
    original = reader.load

    @functools.wraps(original)
    def load(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path) in files:
            return files.pop(str(path))
        return original(path, *args, **kwargs)

    reader.load = load
    try:
        yield
    finally:
        del reader.load
        files.clear()


def read_plain(path: str | Path) -> Any:
    """A file on the host, by torch, for tools that have no engine; CheckpointError if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}).") from error
