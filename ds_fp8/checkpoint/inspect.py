"""Every file of this rank is read and checked before the engine is changed.

DeepSpeed loads the module first and the optimizer afterwards. If a shard is truncated, or belongs to another world size
or stage, the weights are overwritten before it notices. A run that falls back to an older checkpoint needs the engine
as it was. So each rank first reads its files and checks everything that will be used (`records`, `entries`, the layers'
scales, names and shapes of the module). The results are exchanged, and either all ranks go on (with the files in
memory) or all raise. An exception while a damaged file is read counts as a fault too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
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
from ..zero.states_stage0 import Stage0Optimizer
from ..zero.states_stage0_formats import read_state
from ..zero.touched import touched
from .complete import LAYER_FILE
from .deepspeed_entries import (
    check_counters,
    check_groups,
    check_loss_scale,
    check_needed,
    check_scheduler,
    check_shard,
    check_stage0,
    check_states,
    moments_of,
    saved_optimizer,
    states_of,
)
from .entries import check_entry, check_masters, check_moments, check_owner
from .manifest import UNFINISHED, compare, read_manifest
from .module import check_module
from .records import check_records
from .stamp import STAMP, Found, agree

TOUCHED = {
    "CheckpointEngine": touched(reads="load"),
    "Engine": touched(
        reads="_get_all_ckpt_names _get_zero_ckpt_name checkpoint_engine load_universal_checkpoint module optimizer "
        "param_names seq_dp_world_size use_node_local_storage zero_nvme_offload_optimizer zero_optimization "
        "zero_optimization_stage",
    ),
    "ZeroStage12": touched(reads="dp_process_group"),
}

UNIVERSAL_CURE = (
    "  Convert it with `python -m deepspeed.checkpoint.ds_to_universal --input_folder DIR/TAG --output_folder "
    "DIR/TAG_universal`"
    ' and load that with "checkpoint": {"load_universal": true}.'
)


def inspect(
    engine: Any,
    load_dir: Any,
    tag: Any = None,
    *,
    with_optimizer: bool = True,
    check_client_state: Callable[[Any, str], None] | None = None,
    strict: bool = True,
    with_scheduler: bool = True,
    module_only: bool = False,
    must_exist: bool = False,
) -> dict[str, Any]:
    """Read and judge this rank's files; {path: content} of what was read. Collective.

    strict      the module's names and shapes must be those of the file
    with_scheduler, module_only    what the load will take besides
    must_exist  no `latest` is a fault; else DeepSpeed warns, and loads nothing
    CheckpointError on all ranks if any rank finds a fault, or if they would load different things.
    """
    files: dict[str, Any] = {}
    found = Found()
    try:
        tag = named_tag(engine, load_dir) if tag is None else str(tag)
        found = Found(tag=tag, exists=bool(tag) and (Path(load_dir) / str(tag)).is_dir())
        if must_exist and tag is None:
            raise CheckpointError(f"{load_dir}: `latest` is not there.")
        if tag is not None and found.exists:
            found = replace(found, **_against_manifest(engine, Path(load_dir) / tag, with_optimizer))
            step, ids = _inspect_model(engine, load_dir, tag, files, with_optimizer, check_client_state, strict)
            if not module_only:
                _inspect_counters(engine, files, with_scheduler, with_optimizer)
            if with_optimizer:
                ids += _inspect_optimizer(engine, load_dir, tag, files)
            found = replace(found, step=step, ids=tuple(dict.fromkeys(ids)))
            found = replace(found, **_read_against_manifest(Path(load_dir) / tag, files, found))
    except CheckpointError as error:
        found = replace(found, problem=str(error))
    except Exception as error:  # noqa: BLE001  # a damaged file may trip anything; the other ranks must hear of it
        problem = f"{load_dir}/{tag}: damaged, or no checkpoint of this job ({type(error).__name__}: {error})."
        found = replace(found, problem=problem + "\n  Use an older tag.")
    agree(found)
    return files


def named_tag(engine: Any, load_dir: Any) -> str | None:
    """What `latest` says; None where there is none."""
    latest = Path(load_dir) / ("latest_universal" if engine.load_universal_checkpoint() else "latest")
    if not os.path.lexists(latest):
        return None
    try:
        named = latest.read_text(encoding="utf-8").strip()
    except (UnicodeDecodeError, OSError):  # a link to nowhere, a folder
        named = "\0"
    if not named or not named.isprintable():
        raise CheckpointError(
            f"{latest}: names no checkpoint ({named[:40]!r}): a full disk, or damage.\n"
            f"  Pass the tag to load_checkpoint, or mend it with `ds_fp8 latest {load_dir} --repair`."
        )
    return named


def _against_manifest(engine: Any, tag: Path, with_optimizer: bool) -> dict[str, Any]:
    """This rank's share of the tag's files beside the manifest, as fields of Found.

    Weights alone load from a tag whose optimizer shards were deleted to save their space.
    """
    if (tag / UNFINISHED).exists():
        raise CheckpointError(
            f"{tag}: a save into it was broken off; files of two steps may be mixed.\n  Use another tag (`ds_fp8 latest"
            f' {tag.parent}` names the newest complete one; "checkpoint_fallback": true loads it).'
        )
    manifest = read_manifest(tag)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if engine.use_node_local_storage():
        rank, world_size = 0, 1  # each node has files, and a manifest, of its own
    # What DeepSpeed reads part by part, or several of: no rank looks at it below.
    for file in sorted(file for file in tag.glob("*.pt") if LAYER_FILE.match(file.name))[rank::world_size]:
        check_records(file)
    if manifest is None:
        return {}
    names = [name for name in sorted(manifest["files"]) if with_optimizer or not name.endswith("_optim_states.pt")]
    compared = compare(tag, manifest, names[rank::world_size])
    return {"matching": compared.matching, "different": compared.faults}


def _read_against_manifest(tag: Path, read: dict[str, Any], found: Found) -> dict[str, Any]:
    """The files that this rank has read beside the manifest, as fields of Found; another rank may have looked at other
    copies of them. One with an id of ours was not written by a job without ds_fp8: the manifest is not void.
    """
    manifest = read_manifest(tag)
    if manifest is None:
        return {}
    names = [str(Path(path).relative_to(tag)) for path in read if tag in Path(path).parents]
    compared = compare(tag, manifest, [name for name in names if name in manifest["files"]])
    return {
        "matching": found.matching + compared.matching + len(found.ids),
        "different": tuple(dict.fromkeys((*found.different, *compared.faults))),
        "unlisted": tuple(name for name in names if name not in manifest["files"]),
    }


def _inspect_model(
    engine: Any,
    load_dir: Any,
    tag: str,
    files: dict[str, Any],
    with_optimizer: bool,
    check_client_state: Callable[[Any, str], None] | None,
    strict: bool,
) -> tuple[int | None, list[str]]:
    """(optimizer steps of the model file, ids of the saves that it and an optimizer in it come from)."""
    names = engine._get_all_ckpt_names(load_dir, tag)
    absent = [name for name in names if not Path(name).is_file()]
    if absent or not names:
        raise CheckpointError(
            f"{absent[0] if absent else Path(load_dir) / tag}: no model file of DeepSpeed there. Use another tag."
        )
    if len(names) != 1:
        return None, []  # several model-parallel files are merged by DeepSpeed
    state = files[names[0]] = _read(engine, names[0])
    if not isinstance(state, dict) or "module" not in state:
        raise CheckpointError(f"{names[0]}: no model state of DeepSpeed.")
    if check_client_state is not None:
        check_client_state(state.get(KEY), names[0])
    if KEY in state and not isinstance(state[KEY], dict):
        raise CheckpointError(f"{names[0]}: the entry {KEY!r} is {type(state[KEY]).__name__}; it is damaged.")
    if strict and not engine.load_universal_checkpoint():
        check_module(engine.module, state["module"], names[0])
    ids = _ids(state.get(KEY))
    optimizer = engine.optimizer
    if with_optimizer and isinstance(optimizer, Stage0Optimizer):
        saved = state.get("optimizer")
        if saved is None:
            raise CheckpointError(
                f"{names[0]}: no optimizer state, as ZeRO stages keep theirs in files of their own.\n{UNIVERSAL_CURE}"
                "\n  Or load the weights alone with load_optimizer_states=False."
            )
        ids += _inspect_stage0(optimizer, saved, names[0])
    elif with_optimizer and optimizer is not None and not engine.zero_optimization():
        check_stage0(state.get("optimizer"), optimizer, names[0])
    step = state.get("global_steps")
    return step if isinstance(step, int) else None, ids


def _inspect_stage0(optimizer: Any, saved: Any, where: str) -> list[str]:
    """The id of the save that the states of stage 0 come from, which lie in the model file."""
    loaded = read_state(optimizer, saved)
    entry = saved.get(KEY)
    check_entry(entry, where, rank=0, world_size=0)  # every rank of stage 0 has all states
    if entry is not None:
        check_masters(entry, [] if loaded.masters is None else loaded.masters, where)
        check_moments(entry, loaded.states, where)
    groups, own = saved.get(OPTIMIZER_STATE_DICT, saved)["param_groups"], optimizer.optimizer.param_groups
    check_groups(groups, own, where)
    shapes = [{tuple(master.shape), (master.numel(),)} for master in optimizer.fp8_masters]
    check_states(loaded.states, shapes, optimizer.optimizer.moments, where)
    check_needed(groups, own, where)
    check_loss_scale(saved, where)
    return _ids(entry)


def _inspect_counters(engine: Any, files: dict[str, Any], with_scheduler: bool, with_optimizer: bool) -> None:
    """What DeepSpeed takes from the model file besides: counters, and the state of its scheduler."""
    for name, state in files.items():
        check_counters(state, name)
        if state["mp_world_size"] != 1:
            raise CheckpointError(f"{name}: one model file, of {state['mp_world_size']} that were saved.")
        ranks = getattr(engine, "seq_dp_world_size", None)
        shards = with_optimizer and engine.zero_optimization() and not engine.load_universal_checkpoint()
        if shards and ranks is not None and state["dp_world_size"] != ranks:
            raise CheckpointError(
                f"{name}: written by {state['dp_world_size']} data-parallel ranks, this job has {ranks}.\n"
                f"{UNIVERSAL_CURE}"
            )
        if with_scheduler:
            check_scheduler(engine, state.get("lr_scheduler"), name)


def _ids(entry: Any) -> list[str]:
    """The id of the save that an entry of ours comes from; none from before ids."""
    stamp = entry.get(STAMP) if isinstance(entry, dict) else None
    return [str(stamp["id"])] if isinstance(stamp, dict) and "id" in stamp else []


def _inspect_optimizer(engine: Any, load_dir: Any, tag: str, files: dict[str, Any]) -> list[str]:
    """The id of the save that this rank's shard comes from, if it says so."""
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
        cure = f"{UNIVERSAL_CURE}\n  Or load the weights alone with load_optimizer_states=False."
        raise CheckpointError(f"{path}: not there, and {others}.\n{cure}")
    content = files[path] = _read(engine, path)
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
    if entry is not None and flats is not None:
        check_masters(entry, flats, path)
        check_moments(entry, states_of(saved_optimizer(shard)), path)
    return _ids(content.get(KEY)) + _ids(entry)


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


def _read(engine: Any, path: str) -> Any:
    check_records(path)
    try:
        return engine.checkpoint_engine.load(path, map_location="cpu")
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). Truncated or no checkpoint; use an older tag."
        ) from error
