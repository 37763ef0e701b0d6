"""Which checkpoints are complete: found before a job starts, without torch, without an engine, without running a
pickle.

DeepSpeed writes `latest` last, but each rank by itself: a rank killed in its shard leaves a tag that `latest` may name
all the same, and a full disk leaves an empty `latest`. A job that then starts from it dies in an assertion, with good
checkpoints beside it. A tag is complete when

    no save of it was interrupted (`UNFINISHED`), and
    it has a manifest (`MANIFEST`): every file of it is there, and is the one of that save
    or it has none: a model file for every model-parallel rank (ZeRO 3: every rank), an optimizer shard for every rank
    that ought to have one, all of them readable to their end, all of one step

How many there ought to be stands in the model file. torch.save writes a zip archive, with its directory at the end: a
truncated file has none. Its pickle is read with every class replaced by an inert one.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import CheckpointError
from ..zero.touched import touched
from .manifest import MANIFEST, UNFINISHED, compare, read_manifest, read_text

TOUCHED = {
    "Engine": touched(reads="zero_optimization"),
}

MODEL_FILE = re.compile(r"^(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
SHARD = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$")
LAYER_FILE = re.compile(
    r"^(?:layer_\d+-model_\d+|layer_\d+_expert_\d+_mp_rank_\d+|expp?_rank_\d+.*)_(?:model|optim)_states\.pt$"
)

ENTRY = "ds_fp8"
"""Key of our entries, `optim.checkpointing.KEY`, whose module needs torch."""


MOST_NAME_BYTES = 1 << 12
MOST_RANKS = 1 << 20
"""More data-parallel or model-parallel ranks than any job has: damage."""
MOST_STEPS = 1 << 53
MOST_INFLATED_BYTES = 1 << 30
"""Of a pickle that is stored compressed, which torch.save never does: a few MB could stand for any number of GB."""


@dataclass(frozen=True)
class Found:
    """One tag of a checkpoint folder.

    step    optimizer steps done when it was written; -1 where nothing tells
    faults  why it cannot be loaded; empty: complete
    """

    tag: str
    step: int
    faults: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not self.faults


def tags(save_dir: str | Path) -> list[Found]:
    """Every tag in a checkpoint folder, newest first: by step, then by time of writing."""
    folder = Path(save_dir)
    if not folder.is_dir():
        return []
    found = [(look(tag), tag.stat().st_mtime) for tag in folder.iterdir() if tag.is_dir() and is_tag(tag)]
    return [each for each, _ in sorted(found, key=lambda pair: (pair[0].step, pair[1], pair[0].tag), reverse=True)]


def named_by_latest(save_dir: str | Path) -> str | None:
    """What `latest` says; the empty string for an empty or unreadable one, None where there is none."""
    latest = Path(save_dir) / "latest"
    try:
        return read_text(latest, MOST_NAME_BYTES).strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return ""


def look(tag: Path) -> Found:
    """Judge one tag."""
    if (tag / UNFINISHED).exists():
        return Found(tag.name, _step_in(tag.name), ("a save into it was broken off; files of two steps may be mixed",))
    found = _by_manifest(tag)
    if found is not None:
        return found
    faults: list[str] = []
    models: dict[tuple[int, int], dict[str, Any]] = {}
    shards: set[tuple[int, int]] = set()
    saves: set[str] = set()
    for file in sorted(tag.glob("*.pt")):
        if match := MODEL_FILE.match(file.name):
            content = read_inert(file, faults)
            if isinstance(content, dict):
                models[int(match["dp"] or 0), int(match["mp"])] = content
                saves |= {save for _, save in _owners(content)}
        elif match := SHARD.match(file.name):
            shards.add((int(match["dp"]), int(match["mp"])))
            for rank, save in _owners(read_inert(file, faults)):
                saves.add(save)
                if rank not in (None, int(match["dp"])):
                    faults.append(f"{file.name}: holds the states of rank {rank}: renamed")
        elif LAYER_FILE.match(file.name):
            read_inert(file, faults, parse=False)
    if not models:
        return Found(tag.name, _step_in(tag.name), tuple(faults or ["no model file of DeepSpeed"]))
    faults += _missing(tag, models, shards)
    steps = {model["global_steps"] for model in models.values() if is_count(model.get("global_steps"), MOST_STEPS)}
    if len(steps) > 1:
        faults.append(f"model files of different steps: {', '.join(map(str, sorted(steps)))}")
    if len(saves - {""}) > 1:
        faults.append(f"made of files of {len(saves - {''})} saves")
    manifest = read_manifest(tag)
    if manifest is not None and saves - {""}:  # none of its files is there, and no job without ds_fp8 has written these
        faults += compare(tag, manifest, manifest["files"]).faults
    return Found(tag.name, max(steps, default=_step_in(tag.name)), tuple(faults))


def _owners(content: Any) -> Iterator[tuple[int | None, str]]:
    """(data-parallel rank or None, id of the save or the empty string) of each entry of ours in a file."""
    state = content if isinstance(content, dict) else {}
    for holder in (state, state.get("optimizer_state_dict")):
        entry = holder.get(ENTRY) if isinstance(holder, dict) else None
        if isinstance(entry, dict):
            layout, stamp = entry.get("layout", entry), entry.get("save")
            rank = layout.get("rank") if isinstance(layout, dict) else None
            save = stamp.get("id") if isinstance(stamp, dict) else None
            yield rank if is_count(rank, MOST_RANKS) else None, save if isinstance(save, str) else ""


def is_count(value: Any, most: int) -> TypeGuard[int]:
    """A whole number from 0 up to `most`: a longer one is damage, and Python refuses to print the longest."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < most


def is_tag(folder: Path) -> bool:
    """A folder that DeepSpeed writes; the result of a universal conversion (`zero/`) is loaded by another way. A name
    that no terminal shows is nobody's tag.
    """
    if not folder.name.isprintable():
        return False
    return not (folder / "zero").is_dir() and ((folder / MANIFEST).is_file() or any(folder.glob("*_states.pt")))


def _by_manifest(tag: Path) -> Found | None:
    """None: there is none, or a job without ds_fp8 has written over the tag since."""
    try:
        manifest = read_manifest(tag)
    except CheckpointError as error:
        return Found(tag.name, _step_in(tag.name), (str(error).split("\n")[0].rpartition(f"{tag.name}/")[2],))
    if manifest is None:
        return None
    compared = compare(tag, manifest, manifest["files"])
    if compared.faults and not compared.matching:
        return None
    return Found(tag.name, int(manifest.get("step", _step_in(tag.name))), compared.faults)


def _missing(tag: Path, models: dict[tuple[int, int], dict], shards: set[tuple[int, int]]) -> Iterator[str]:
    """Files that ought to be there, by what a model file says of the job that wrote it."""
    first = models[min(models)]
    for key in ("dp_world_size", "mp_world_size"):
        if isinstance(first.get(key), int) and not is_count(first[key], MOST_RANKS):
            yield f"{key} is no number of ranks"
    dp_size, mp_size = (_size(first, key) for key in ("dp_world_size", "mp_world_size"))
    mp_size = max(mp_size, 1 + max(mp for _, mp in models))
    stage = _zero_stage(first)
    each_rank = any(file.name.startswith("zero_pp_rank_") and MODEL_FILE.match(file.name) for file in tag.glob("*.pt"))
    for mp in range(mp_size):
        for dp in range(dp_size if each_rank else 1):
            if (dp, mp) not in models:
                yield f"the model file of rank {dp}, model-parallel rank {mp}, is missing or unreadable"
    if not shards and (stage == 0 or (stage is None and first.get("optimizer") is not None)):
        return  # no ZeRO: the optimizer's state is in the model file
    if not shards and stage is None:
        return
    for mp in range(mp_size):
        lacking = [dp for dp in range(dp_size) if (dp, mp) not in shards]
        if lacking:
            shown = ", ".join(map(str, lacking[:8])) + (", ..." if len(lacking) > 8 else "")
            yield f"optimizer shards of rank {shown} of {dp_size} are missing" + (
                f" (model-parallel {mp})" if mp else ""
            )


def _size(model: dict[str, Any], key: str) -> int:
    value = model.get(key)
    return value if is_count(value, MOST_RANKS) and value > 0 else 1


def _zero_stage(model: dict[str, Any]) -> int | None:
    """From the DeepSpeed JSON that the model file carries; None where it carries none."""
    config = model.get("ds_config")
    if not isinstance(config, dict):
        return None
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    return stage if isinstance(stage, int) else None


def _step_in(tag: str) -> int:
    """`global_step20` -> 20: only where no file tells better."""
    match = re.search(r"(\d+)$", tag)
    return int(match[1]) if match else -1


def read_inert(file: Path, faults: list[str], parse: bool = True) -> Any:
    """What torch.save wrote, tensors left out; None, and a fault appended to `faults`, if it cannot be read."""
    try:
        if not file.is_file():
            faults.append(f"{file.name}: no file, but a folder, a pipe or a device")
            return None
        if file.stat().st_size == 0:
            faults.append(f"{file.name}: empty")
            return None
        with file.open("rb") as stream:
            if stream.read(2) != b"PK":  # the format before torch 1.6 has no end to look for
                return None if not parse else {}
        with zipfile.ZipFile(file) as archive:
            name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if name is None:
                faults.append(f"{file.name}: no file of torch.save")
                return None
            record = archive.getinfo(name)
            if record.compress_type != zipfile.ZIP_STORED and record.file_size > MOST_INFLATED_BYTES:
                faults.append(f"{file.name}: {record.file_size} bytes, compressed: no file of torch.save")
                return None
            with archive.open(name) as stream:
                return _InertUnpickler(stream).load() if parse else None
    except zipfile.BadZipFile:
        faults.append(f"{file.name}: truncated or damaged ({file.stat().st_size} bytes)")
    except OSError as error:
        faults.append(f"{file.name}: cannot be read ({error.strerror})")
    except Exception as error:  # noqa: BLE001 - a damaged pickle may raise anything; nothing of it is run
        faults.append(f"{file.name}: damaged ({type(error).__name__}: {error})")
    return None


class _Inert(dict):
    """Stands for an object of any class: takes whatever a pickle does to it, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    add = append


class _InertUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers and strings; imports and calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, key: Any) -> Any:
        return None
