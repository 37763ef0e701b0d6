"""Loading: nothing is touched before all ranks have judged their files; on demand the newest complete checkpoint is
taken.

`inspect` reads and judges on every rank while the engine is still untouched, and the ranks agree. So after a refusal
another tag can be tried at once: with `checkpoint_fallback` a job that asks for "the latest" and cannot have it goes on
from the newest complete one in the same folder, and says so in a line. A tag that the script names is never replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from ..errors import CheckpointError
from ..zero.touched import touched
from .complete import tags
from .exchange import from_all_ranks, from_rank_0
from .inspect import inspect, named_tag

TOUCHED = {
    "CheckpointEngine": touched(reads="load", writes="load"),
    "Engine": touched(overrides="_get_all_ckpt_names", reads="checkpoint_engine load_universal_checkpoint"),
}


def load_checkpoint(
    original: Callable,
    engine: Any,
    load_dir: Any,
    tag: Any = None,
    *args: Any,
    check_client_state: Callable[[Any, str], None] | None = None,
    fallback: bool = False,
    **kwargs: Any,
) -> Any:
    """DeepSpeed's load_checkpoint (`original`, bound to the engine) after `inspect` has found nothing wrong.

    fallback  where no tag is given and the latest one cannot be loaded, the newest complete one is
    """
    names = ("load_module_strict", "load_optimizer_states", "load_lr_scheduler_states", "load_module_only")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    with_optimizer = given.get("load_optimizer_states", True) and not given.get("load_module_only", False)
    strict = given.get("load_module_strict", True) and given.get("custom_load_fn") is None and len(args) < 5
    with _model_files_of_any_stage(engine):
        look = functools.partial(
            inspect,
            engine,
            load_dir,
            with_optimizer=with_optimizer,
            check_client_state=check_client_state,
            strict=strict,
            with_scheduler=given.get("load_lr_scheduler_states", True),
            module_only=given.get("load_module_only", False),
        )
        shown = None
        if fallback and tag is None and load_dir and not engine.load_universal_checkpoint():
            tag, files, shown = _read_newest(engine, load_dir, look)
        else:
            files = look(tag=tag)
        with _already_read(engine, files):
            result = original(load_dir, tag, *args, **kwargs)
    if shown is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        print(f"ds_fp8: {shown}", flush=True)
    return result


def _read_newest(
    engine: Any, load_dir: Any, look: Callable[..., dict[str, Any]]
) -> tuple[str | None, dict[str, Any], str | None]:
    """(tag, its files, what to tell) of `latest`, or of the newest complete checkpoint that all ranks can load.
    Collective.
    """
    try:
        return None, look(tag=None, must_exist=True), None
    except CheckpointError as error:  # on all ranks
        refused = error
    reasons = []
    for tag in _complete(load_dir):
        try:
            files = look(tag=tag, must_exist=True)
        except CheckpointError as error:
            reasons.append(_first_line(error))
            continue
        return (
            tag,
            files,
            f"{_first_line(refused)} Loaded {tag} instead, the newest complete one (checkpoint_fallback).",
        )
    if not reasons and not any(from_all_ranks(_is_named(engine, load_dir))):
        return None, look(tag=None), None  # a first start: there is nothing yet
    raise CheckpointError(
        f"{refused}\n  checkpoint_fallback found no other complete checkpoint in {load_dir}"
        + (": " + "; ".join(reasons[:3]) if reasons else "")
        + "."
    )


def _complete(load_dir: Any) -> list[str]:
    """Complete tags as rank 0 sees them, newest first, on all ranks."""
    return list(from_rank_0([each.tag for each in tags(load_dir) if each.complete]))


def _is_named(engine: Any, load_dir: Any) -> bool:
    """There is a `latest`, or a folder of a checkpoint: this is no first start."""
    try:
        return named_tag(engine, load_dir) is not None or bool(tags(load_dir))
    except CheckpointError:
        return True


def _first_line(error: CheckpointError) -> str:
    return str(error).splitlines()[0]


@contextmanager
def _model_files_of_any_stage(engine: Any) -> Iterator[None]:
    """Let a universal checkpoint load in another stage than it was converted from.

    Stage 3 names its model files `zero_pp_rank_0_mp_rank_00...`, stages 1 and 2 `mp_rank_00...`, and each looks for its
    own name only. For a universal checkpoint the file holds counters and schedulers, no weights: either will do.
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
