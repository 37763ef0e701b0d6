"""The optimizer's files that this rank will load: its shard of ZeRO, or those of a universal checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from ..zero.states import KEY
from ..zero.touched import touched
from .deepspeed_entries import check_shard, check_state_count, moments_of, saved_optimizer, states_of
from .entries import check_entry, check_masters, check_moments, check_owner
from .reading import read_by_engine
from .records import check_records
from .stamp import ids_of
from .universal import CONVERT

TOUCHED = {
    "Engine": touched(
        reads="_get_zero_ckpt_name load_universal_checkpoint optimizer param_names zero_nvme_offload_optimizer "
        "zero_optimization zero_optimization_stage",
    ),
    "ZeroStage12": touched(reads="dp_process_group"),
}


def inspect_optimizer(engine: Any, load_dir: Any, tag: str, files: dict[str, Any]) -> list[str]:
    """The id of the save that this rank's shard comes from, if it says so; nothing for a universal checkpoint.

    files  gets the path and the content of the shard
    CheckpointError if the shard is not there, damaged, or not this rank's.
    """
    if not engine.zero_optimization():
        return []
    if engine.load_universal_checkpoint():
        _inspect_universal(engine, Path(load_dir) / tag)
        return []
    path = engine._get_zero_ckpt_name(load_dir, tag)
    if not Path(path).is_file():
        if engine.zero_nvme_offload_optimizer():
            return []  # DeepSpeed keeps the states in folders of their own
        count = len(list(Path(path).parent.glob("*_optim_states.pt")))
        others = f"{count} optimizer shards are: another world size or base dtype" if count else "no other shard is"
        cure = f"{CONVERT}\n  Or load the weights alone with load_optimizer_states=False."
        raise CheckpointError(f"{path}: not there, and {others}.\n{cure}")
    content = files[path] = read_by_engine(engine, path)
    shard = content.get(OPTIMIZER_STATE_DICT) if isinstance(content, dict) else None
    if not isinstance(shard, dict):
        raise CheckpointError(f"{path}: no optimizer shard of DeepSpeed.")
    entry, group = shard.get(KEY), engine.optimizer.dp_process_group
    place = {"rank": dist.get_rank(group=group), "world_size": dist.get_world_size(group=group)}
    check_owner(content.get(KEY), path, **place)
    check_entry(entry, path, **place)
    _check_layout(engine, shard, path)
    flats = shard.get(FP32_FLAT_GROUPS, shard.get(SINGLE_PARTITION_OF_FP32_GROUPS))
    check_shard(shard, engine.optimizer, flats, path)
    check_state_count(content.get(KEY), saved_optimizer(shard), path)
    if entry is not None and flats is not None:
        check_masters(entry, flats, path)
        check_moments(entry, states_of(saved_optimizer(shard)), path)
    return ids_of(content.get(KEY)) + ids_of(entry)


def _check_layout(engine: Any, shard: dict[str, Any], path: str) -> None:
    """Stage, world size and sizes, as far as DeepSpeed's shard tells them."""
    stage = int(engine.zero_optimization_stage())
    saved_stage = int(shard.get(ZERO_STAGE, stage))
    if (saved_stage == 3) != (stage == 3):
        raise CheckpointError(f"{path}: written in ZeRO stage {saved_stage}, this job is stage {stage}.\n{CONVERT}")
    optimizer = engine.optimizer
    world_size = dist.get_world_size(group=optimizer.dp_process_group)
    count = shard.get(PARTITION_COUNT)
    count = max(count) if isinstance(count, (list, tuple)) else count
    if isinstance(count, int) and count != world_size:
        raise CheckpointError(f"{path}: written by {count} data-parallel ranks, this job has {world_size}.\n{CONVERT}")
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
                f"{path}: partition {index} has {flat.numel()} elements, this job's has {master.numel()}: "
                "another model."
            )


def _inspect_universal(engine: Any, folder: Path) -> None:
    """Every parameter of this rank has a file for its weight and each moment. They are read when they are loaded."""
    keys = ("fp32", *(name for name in moments_of(engine.optimizer) if name != "step"))
    if not (folder / "zero" / "optimizer_state.pt").is_file():
        raise CheckpointError(f"{folder}: no universal checkpoint (zero/optimizer_state.pt is missing).")
    missing = [
        f"{name}/{key}.pt"
        for param, name in engine.param_names.items()
        if param.requires_grad
        for key in keys
        if not (folder / "zero" / name / f"{key}.pt").is_file()
    ]
    for param, name in engine.param_names.items():
        if param.requires_grad and not missing:
            for key in keys:
                check_records(folder / "zero" / name / f"{key}.pt")
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{folder}/zero lacks {', '.join(missing[:3])}{more}: another model, or a broken conversion."
        )
