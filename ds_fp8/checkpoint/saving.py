"""A complete checkpoint or none: a manifest written last, when all ranks are done, and `latest` only after it.

DeepSpeed lets rank 0 write `latest` when *its* files are written. A rank that is killed in its shard then leaves a
`latest` that names half a checkpoint; overwriting a tag leaves files of two steps in one folder. So around DeepSpeed's
save:

    before   the tag's old manifest goes, a file UNFINISHED comes; from here on nobody takes the tag for complete
    after    every rank looks at the files it has written; all meet; rank 0 writes the manifest, takes UNFINISHED away,
             and lets `latest` name the tag, each in one move

The manifest says for each file its bytes and a digest of the archive's own directory, in which torch.save has noted a
CRC-32 of every tensor: a file of another save has another one, and `ds_fp8 verify` needs nothing else to find a
flipped bit. Nothing is read twice while training waits. Unmodified DeepSpeed reads all of it as ever.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT

from ..errors import CheckpointError
from ..zero.states import KEY
from ..zero.touched import touched
from .complete import SHARD
from .deepspeed_entries import STATES, count_states, saved_optimizer
from .exchange import from_all_ranks
from .manifest import MANIFEST, UNFINISHED, directory_digest
from .stamp import STAMP

TOUCHED = {
    "CheckpointEngine": touched(reads="save", writes="save"),
    "Engine": touched(reads="checkpoint_engine global_rank local_rank optimizer use_node_local_storage"),
    "ZeroStage12": touched(reads="dp_process_group"),
}

VERSION = 1


def save_checkpoint(
    original: Callable,
    engine: Any,
    stamp: dict[str, Any],
    save_dir: Any,
    tag: Any = None,
    client_state: dict[str, Any] | None = None,
    save_latest: bool = True,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """DeepSpeed's save_checkpoint (`original`, bound to the engine) with a manifest. Collective, as the original is.

    stamp   of this save (`stamp.py`); its id goes into the manifest too

    CheckpointError on all ranks if the folder cannot be written. Checkpoint engines that go on writing after the call
    has returned (DataStates, decoupled, fast) have no moment at which all is done: they save as DeepSpeed does, without
    a manifest.
    """
    if not save_dir or not _is_done_on_return(engine):
        if save_dir:  # of an earlier save into this tag
            (Path(save_dir) / stamp["tag"] / MANIFEST).unlink(missing_ok=True)
        return original(save_dir, tag, client_state or {}, save_latest, *args, **kwargs)
    folder = Path(save_dir) / stamp["tag"]
    # With node-local storage each node has a folder, and a manifest, of its own.
    writer = int(engine.local_rank if engine.use_node_local_storage() else engine.global_rank) == 0
    _all_or_none(_begin(folder) if writer else None)
    with _noted_files(engine, stamp) as written:
        result = original(save_dir, tag, client_state or {}, False, *args, **kwargs)
    found = from_all_ranks(_described(folder, written))
    problem = None
    if writer:
        files = {name: entry for each in found for name, entry in each.items() if (folder / name).is_file()}
        problem = _finish(folder, files, stamp)
        if save_latest and problem is None and engine.global_rank == 0:
            problem = _replace(Path(save_dir) / "latest", stamp["tag"])
    _all_or_none(problem)  # nobody goes on, or leaves, before it is complete
    return result


def _is_done_on_return(engine: Any) -> bool:
    return type(engine.checkpoint_engine).__name__ == "TorchCheckpointEngine"


@contextmanager
def _noted_files(engine: Any, stamp: dict[str, Any]) -> Iterator[list[Path]]:
    """The paths that this rank hands to DeepSpeed's writer; each optimizer shard says which save and rank it is of, and
    how many states it holds.
    """
    writer, written = engine.checkpoint_engine, []
    original = writer.save

    @functools.wraps(original)
    def save(state_dict: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        written.append(Path(path))
        shard = SHARD.match(Path(path).name)
        if shard and isinstance(state_dict, dict) and KEY not in state_dict:
            owner = {"rank": int(shard["dp"]), "world_size": _data_parallel_size(engine)}
            base = saved_optimizer(state_dict.get(OPTIMIZER_STATE_DICT) or {})
            state_dict = {**state_dict, KEY: {STAMP: stamp, **owner, STATES: count_states(base)}}
        elif isinstance(state_dict, dict) and isinstance(state_dict.get("optimizer"), dict) and KEY in state_dict:
            saved = state_dict["optimizer"]  # of stage 0
            count = count_states(saved.get(OPTIMIZER_STATE_DICT, saved))
            state_dict = {**state_dict, KEY: {**state_dict[KEY], STATES: count}}
        return original(state_dict, path, *args, **kwargs)

    writer.save = save
    try:
        yield written
    finally:
        del writer.save


def _data_parallel_size(engine: Any) -> int:
    group = getattr(engine.optimizer, "dp_process_group", None)
    return int(dist.get_world_size(group=group))


def _described(folder: Path, written: list[Path]) -> dict[str, Any]:
    found = {}
    for path in dict.fromkeys(written):
        if path.parent == folder or folder in path.parents:
            found[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "directory": directory_digest(path)}
    return found


def _begin(folder: Path) -> str | None:
    """The folder says that it is being written; a problem as text."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED).touch()
        (folder / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        return f"{folder}: cannot be written ({error.strerror}); nothing was saved."
    return None


def _finish(folder: Path, files: dict[str, Any], stamp: dict[str, Any]) -> str | None:
    manifest = {"version": VERSION, "save_id": stamp["id"], "step": stamp["step"], "files": dict(sorted(files.items()))}
    problem = _replace(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if problem is None:
        (folder / UNFINISHED).unlink(missing_ok=True)
    return problem


def finish_alone(folder: Path, step: int) -> None:
    """The manifest of a folder that one process has written, as `convert` does."""
    files = _described(folder, sorted(folder.glob("*.pt")))
    problem = _finish(folder, files, {"id": secrets.token_hex(8), "step": step})
    if problem is not None:
        raise CheckpointError(problem)


def _replace(path: Path, text: str) -> str | None:
    """In one move, and on the disk before it counts; a problem as text."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with new.open("x", encoding="utf-8") as file:  # a link that somebody has put there is not followed
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        return f"{path}: cannot be written ({error.strerror}); this checkpoint is not complete."
    return None


def _all_or_none(problem: str | None) -> None:
    """A barrier; CheckpointError on every rank if one has a problem."""
    problems = [found for found in from_all_ranks(problem) if found is not None]
    if problems:
        raise CheckpointError(problems[0])
