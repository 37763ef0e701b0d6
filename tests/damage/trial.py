"""One job whose checkpoint is damaged, in each way in turn, under one rank or two; what came of each damage.

The ranks compare their verdicts through files, not through collectives: a rank that hangs in one cannot say so.

    refused          every rank raises CheckpointError, and the engine is what it was
    harmless         every rank loads it, and the next losses are those of the undamaged one
    other losses     every rank loads it, and they are not
    raw error        another exception, or one in the step after the load
    refused late     CheckpointError, and the engine has changed
    ranks differ     one refuses, another loads
    hang             not done in time, or the process has died

The engine is a fingerprint over weights, states, scales, histories, schedulers and counters.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damages
import old_jobs
import torch

from ds_fp8.checkpoint.manifest import MANIFEST

SCHEDULER = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1e-2}}
FP8 = {"recipe": "delayed", "amax_history_len": 4}
LEVELS: dict[str, dict[str, Any]] = {
    "fp8": {"fp8": FP8},
    "O2": {"fp8": FP8, "msamp": {"opt_level": "O2"}},
    "O3": {"fp8": FP8, "msamp": {"opt_level": "O3"}},
}
WAIT_S = 30.0
"""For the other rank's verdict."""


@dataclass(frozen=True)
class Trial:
    """One engine.

    level, stage, world_size    of the job
    manifest                    whether the checkpoint keeps its manifest
    every                       take each such damage: 1 all, 7 every seventh
    seed                        take as many at random instead; None: no
    only                        take those whose name this expression finds
    """

    level: str
    stage: int
    world_size: int
    manifest: bool
    every: int = 1
    seed: int | None = None
    only: str = ""

    @property
    def name(self) -> str:
        return (
            f"{self.level}, stage {self.stage}, {self.world_size} rank{'s' if self.world_size > 1 else ''}, "
            f"{'with' if self.manifest else 'without'} manifest"
        )


def fingerprint(engine: Any) -> str:
    """A hash of all that a load changes."""
    from ds_fp8.engine.attach import of
    from ds_fp8.engine.checkpointing import _fingerprint

    optimizer = {key: value for key, value in engine.optimizer.state_dict().items() if key != "param_slice_mappings"}
    counted = [engine.global_steps, engine.global_samples, engine.skipped_steps]  # DeepSpeed goes on with micro steps
    parameters = [parameter.data for parameter in engine.module.parameters()]
    layers = of(engine).fp8_state.state_dict()
    return _fingerprint([parameters, optimizer, engine.lr_scheduler.state_dict(), counted, layers])


class Ranks:
    """What each rank has found, in files of one folder."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size

    def everyone(self, number: Any, own: Any) -> list[Any]:
        """What all ranks say of `number`; a rank that says nothing in WAIT_S is None."""
        file = self.folder / f"{number}_{self.rank}"
        file.with_suffix(".new").write_text(json.dumps(own))
        file.with_suffix(".new").rename(file)
        end, found = time.monotonic() + WAIT_S, {}
        while len(found) < self.world_size and time.monotonic() < end:
            for rank in range(self.world_size):
                other = self.folder / f"{number}_{rank}"
                if rank not in found and other.exists():
                    found[rank] = json.loads(other.read_text())
            if len(found) < self.world_size:
                time.sleep(0.001)
        return [found.get(rank) for rank in range(self.world_size)]


def files_of(tag: Path, rank: int) -> list[Path]:
    """The files of a tag that are damaged: those that the last rank reads."""
    ranked = [file for file in sorted(tag.glob("*.pt")) if f"zero_pp_rank_{rank}_" in file.name]
    return [*(file for file in sorted(tag.glob("mp_rank_*_model_states.pt"))), *ranked]


def cases(tag: Path, older: Path, trial: Trial) -> list[tuple[Path, damages.Damage]]:
    """(file, damage) of a good checkpoint, in an order that all ranks share."""
    last = trial.world_size - 1
    found = []
    for file in files_of(tag, last):
        others = {"an older save's": older / file.name}
        others |= {f"{other.name}": other for other in sorted(tag.glob("*.pt")) if other.name != file.name}
        found += [(file, damage) for damage in damages.every(file, others)]
    found = [one for one in found if re.search(trial.only, one[1].name)]
    if trial.seed is None:
        return found[:: trial.every]
    draw = random.Random(f"{trial.seed} {trial.name}")
    return [found[number] for number in sorted(draw.sample(range(len(found)), -(-len(found) // trial.every)))]


def run(rank: int, trial: Trial, place: Path, first: int, report: Any) -> None:
    """Each damage from number `first` on; `report(line)` on rank 0, also before each one begins.

    A model file that all ranks read is damaged in the last rank's copy of the folder alone, as where nodes have disks
    of their own; a shard where it lies.
    """
    torch.manual_seed(0)
    job = {**LEVELS[trial.level], "stage": trial.stage, "scheduler": SCHEDULER}
    engine = old_jobs.make_engine(job)
    last = trial.world_size - 1
    early, good = place / "early", place / "good"
    for folder, steps in ((early, range(1)), (good, range(1, 2))):
        old_jobs.train(engine, steps)
        engine.save_checkpoint(str(folder), tag="a")
    ranks = Ranks(place, rank, trial.world_size)
    bad = place / "bad"
    if rank == 0:
        if not trial.manifest:
            (good / "a" / MANIFEST).unlink()
        shutil.copytree(good, bad)
    ranks.everyone("copied", None)
    wanted = old_jobs.train(engine, range(2, 4))
    _back(engine, good, wanted)
    before = fingerprint(engine)
    contents = {file: torch.load(file, map_location="cpu", weights_only=False) for file in files_of(good / "a", last)}
    all_cases = cases(good / "a", early / "a", trial)
    for number, (file, damage) in enumerate(all_cases):
        if number < first:
            continue
        target = bad / "a" / file.name
        is_shared = trial.world_size == 1 or "zero_pp_rank" in file.name
        if rank == 0:
            report({"begins": number, "file": file.name, "damage": damage.name, "kind": damage.kind})
            damage.do(file, contents[file], target)
        ranks.everyone(f"{number}a", None)
        verdict = _attempt(engine, bad if is_shared or rank == last else good, before, wanted)
        found = ranks.everyone(f"{number}b", verdict)
        if rank == 0:
            _restore(file, target)
        outcome = judge(found)
        if rank == 0:
            report({"ends": number, "of": len(all_cases), "outcome": outcome, "said": _said(found)})
        if outcome in ("hang", "ranks differ", "raw error", "refused late"):
            return  # whatever the engine is now: the next one begins with a new engine
        if outcome in ("other losses", "other state", "nothing loaded"):
            _back(engine, good, wanted)
            if fingerprint(engine) != before:
                raise RuntimeError(f"after {damage.name} the undamaged checkpoint does not bring the engine back")
    if rank == 0:
        report({"done": True})


def _back(engine: Any, good: Path, wanted: list[float]) -> None:
    """From the undamaged checkpoint to two steps behind it, where every damage meets the engine."""
    engine.load_checkpoint(str(good), tag="a")
    losses = old_jobs.train(engine, range(2, 4))
    if losses != wanted:
        raise RuntimeError(f"the undamaged checkpoint goes on with {losses}, not {wanted}")


def _attempt(engine: Any, folder: Path, before: str, wanted: list[float]) -> tuple[str, str]:
    """(what came of it on this rank, what was said)."""
    from ds_fp8.errors import CheckpointError

    try:
        path, _ = engine.load_checkpoint(str(folder), tag="a")
    except CheckpointError as error:
        return ("refused" if fingerprint(engine) == before else "refused late"), str(error)
    except Exception as error:  # noqa: BLE001  what must not come
        return "raw error", f"{type(error).__name__}: {error}"
    if path is None:
        return "nothing loaded", ""
    try:
        losses = old_jobs.train(engine, range(2, 4))
    except Exception as error:  # noqa: BLE001  what must not come
        return "raw error", f"in the next step: {type(error).__name__}: {error}"
    if losses != wanted:
        return "other losses", f"{losses}, not {wanted}"
    return ("harmless" if fingerprint(engine) == before else "other state"), ""


WORST = ("hang", "raw error", "refused late", "ranks differ", "nothing loaded", "other losses", "other state")


def judge(found: list[Any]) -> str:
    """One word for what all ranks have found."""
    if any(one is None for one in found):
        return "hang"
    outcomes = {outcome for outcome, _ in found}
    if len(outcomes) == 1:
        return str(outcomes.pop())
    if outcomes <= {"harmless", "other losses", "other state"}:
        return next(one for one in WORST if one in outcomes)
    return next((one for one in WORST[:3] if one in outcomes), "ranks differ")


def _said(found: list[Any]) -> str:
    return " | ".join(dict.fromkeys("nothing" if one is None else one[1].partition("\n")[0] for one in found))[:400]


def _restore(file: Path, target: Path) -> None:
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        target.rmdir()
    shutil.copy(file, target)


def lines_of(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # a line that was cut off when its process was ended
            continue
