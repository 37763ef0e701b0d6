"""Every file of this rank is read and checked before the engine is changed.

DeepSpeed loads the module first and the optimizer afterwards. If a shard is truncated, or belongs to another world size
or stage, the weights are overwritten before it notices. A run that falls back to an older checkpoint needs the engine
as it was. So each rank first reads its files and checks everything that will be used (`model_file`, `optimizer_files`).
The results are exchanged, and either all ranks go on (with the files in memory) or all raise. An exception while a
damaged file is read counts as a fault too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from ..errors import CheckpointError
from ..zero.touched import touched
from .complete import LAYER_FILE, MOST_NAME_BYTES
from .manifest import UNFINISHED, compare, read_manifest, read_text
from .model_file import inspect_counters, inspect_model
from .optimizer_files import inspect_optimizer
from .records import check_records
from .stamp import RankView, agree

TOUCHED = {
    "Engine": touched(reads="load_universal_checkpoint use_node_local_storage"),
}


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
    view = RankView()
    try:
        tag = named_tag(engine, load_dir) if tag is None else str(tag)
        view = RankView(tag=tag, exists=bool(tag) and (Path(load_dir) / str(tag)).is_dir())
        if must_exist and tag is None:
            raise CheckpointError(f"{load_dir}: `latest` is not there.")
        if tag is not None and view.exists:
            view = replace(view, **_against_manifest(engine, Path(load_dir) / tag, with_optimizer))
            step, ids = inspect_model(engine, load_dir, tag, files, with_optimizer, check_client_state, strict)
            if not module_only:
                inspect_counters(engine, files, with_scheduler, with_optimizer)
            if with_optimizer:
                ids += inspect_optimizer(engine, load_dir, tag, files)
            view = replace(view, step=step, ids=tuple(dict.fromkeys(ids)))
            view = replace(view, **_read_against_manifest(Path(load_dir) / tag, files, view))
    except CheckpointError as error:
        view = replace(view, problem=str(error))
    except Exception as error:  # noqa: BLE001  # a damaged file may trip anything; the other ranks must hear of it
        problem = f"{load_dir}/{tag}: damaged, or no checkpoint of this job ({type(error).__name__}: {error})."
        view = replace(view, problem=problem + "\n  Use an older tag.")
    agree(view)
    return files


def named_tag(engine: Any, load_dir: Any) -> str | None:
    """What `latest` says; None where there is none."""
    latest = Path(load_dir) / ("latest_universal" if engine.load_universal_checkpoint() else "latest")
    if not os.path.lexists(latest):
        return None
    try:
        named = read_text(latest, MOST_NAME_BYTES).strip()
    except (ValueError, OSError):  # a link to nowhere, a folder, a pipe
        named = "\0"
    if not named or not named.isprintable():
        raise CheckpointError(
            f"{latest}: names no checkpoint ({named[:40]!r}): a full disk, or damage.\n"
            f"  Pass the tag to load_checkpoint, or mend it with `ds_fp8 latest {load_dir} --repair`."
        )
    return named


def _against_manifest(engine: Any, tag: Path, with_optimizer: bool) -> dict[str, Any]:
    """This rank's share of the tag's files beside the manifest, as fields of RankView.

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


def _read_against_manifest(tag: Path, read: dict[str, Any], view: RankView) -> dict[str, Any]:
    """The files that this rank has read beside the manifest, as fields of RankView; another rank may have looked at
    other copies of them.
    """
    manifest = read_manifest(tag)
    if manifest is None:
        return {}
    names = [str(Path(path).relative_to(tag)) for path in read if tag in Path(path).parents]
    compared = compare(tag, manifest, [name for name in names if name in manifest["files"]])
    return {
        "matching": view.matching + compared.matching,
        "different": tuple(dict.fromkeys((*view.different, *compared.faults))),
        "unlisted": tuple(name for name in names if name not in manifest["files"]),
    }
