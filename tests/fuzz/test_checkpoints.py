"""Checkpoints damaged at random, under two ranks: refused by both with the engine untouched, or harmless to the last
digit.

Damages of files (a bit, a lost sector, truncated, empty, missing, doubled, renamed into each other, links to nowhere
and to themselves, folders in their place, garbage in `latest` and in the manifest) and of values in our own entries
(None, another type, another shape, NaN, minus one, a missing key; saved anew, so that every CRC is right). What must
never happen: another exception than CheckpointError, a refusal that has changed a weight, a load with other losses, two
ranks of two opinions.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import old_jobs
import pytest
import torch
from budget import seeds
from ranks import run_ranks
from test_integrity import MODEL, shard, weights

from ds_fp8.checkpoint.manifest import MANIFEST

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(0)]

JOBS = {
    "fp8": {"stage": 2, "fp8": {"recipe": "delayed", "amax_history_len": 4}},
    "O2": {"stage": 2, "fp8": {"recipe": "delayed", "amax_history_len": 4}, "msamp": {"opt_level": "O2"}},
}


def flip(file: Path, chosen: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    file.write_bytes(content)


def lose_sector(file: Path, chosen: random.Random) -> None:
    content = bytearray(file.read_bytes())
    at = chosen.randrange(len(content))
    content[at : at + 512] = bytes(len(content[at : at + 512]))
    file.write_bytes(content)


def truncate(file: Path, chosen: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: chosen.choice((0, 1, len(content) - 1, chosen.randrange(len(content))))])


def append(file: Path, chosen: random.Random) -> None:
    file.write_bytes(file.read_bytes() + chosen.randbytes(chosen.randrange(1, 5000)))


def remove(file: Path, chosen: random.Random) -> None:
    file.unlink()


def link(file: Path, chosen: random.Random) -> None:
    file.unlink()
    file.symlink_to(chosen.choice(("nowhere", file.name, "..", "/dev/null", MODEL, shard(0))))


def folder(file: Path, chosen: random.Random) -> None:
    file.unlink()
    file.mkdir()


def another(file: Path, chosen: random.Random) -> Path:
    others = [one for one in sorted(file.parent.glob("*.pt")) if one != file and one.is_file() and not one.is_symlink()]
    older = file.parents[1] / "older" / file.name
    return chosen.choice([*others, *([older] if older.exists() or not others else [])])


def replace(file: Path, chosen: random.Random) -> None:
    shutil.copy(another(file, chosen), file)


def exchange(file: Path, chosen: random.Random) -> None:
    other = another(file, chosen)
    content = file.read_bytes()
    shutil.copy(other, file)
    other.write_bytes(content)


def rename(file: Path, chosen: random.Random) -> None:
    file.rename(
        file.with_name(chosen.choice(("x.pt", shard(7), "mp_rank_01_model_states.pt", "layer_00-model_states.pt")))
    )


FILE_DAMAGES = (flip, flip, flip, lose_sector, truncate, append, remove, link, folder, replace, exchange, rename)


def forge(file: Path, chosen: random.Random) -> str:
    """One wrong value somewhere in our entry, saved anew."""
    content = torch.load(file, weights_only=False)
    node = content["ds_fp8"] if file.name == MODEL else content["optimizer_state_dict"].get("ds_fp8")
    if node is None:
        return "nothing of ours there"
    path: list[Any] = []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = chosen.choice(keys)
        path.append(key)
        inner = node[key]
        if not isinstance(inner, (dict, list)) or not inner or chosen.random() < 0.2:
            break
        node = inner
    if isinstance(node, dict) and chosen.random() < 0.2:
        del node[key]
        done = "deleted"
    elif isinstance(inner, torch.Tensor):
        wrong: Any = inner.clone()
        kind = chosen.choice(("shape", "dtype", "nan", "negative", "list", "none"))
        if kind == "nan" and wrong.is_floating_point() and wrong.numel():
            wrong.view(-1)[chosen.randrange(wrong.numel())] = float("nan")
        elif kind == "negative" and wrong.is_floating_point():
            wrong = -wrong.abs() - 1
        elif kind == "dtype":
            wrong = wrong.to(torch.float64 if wrong.dtype != torch.float64 else torch.int32)
        elif kind == "list":
            wrong = [1.0]
        elif kind == "none":
            wrong = None
        else:
            wrong = wrong.reshape(-1)[: wrong.numel() // 2]
        node[key], done = wrong, kind
    else:
        done = repr(wrong := chosen.choice((None, "text", -1, 1.5, [], {}, [None], {"x": 1}, float("nan"), 10**30)))
        node[key] = wrong
    torch.save(content, file)
    (file.parent / MANIFEST).unlink(missing_ok=True)
    return f"{'/'.join(map(str, path))} {done}"


def damage(place: Path, seed: int) -> str:
    """Do one or two things to a copy of a checkpoint; what was done."""
    chosen = random.Random(seed)
    tag = place / "a"
    done = []
    if chosen.random() < 0.3:
        (tag / MANIFEST).unlink()
        done.append("no manifest")
    for _ in range(chosen.choice((1, 1, 2))):
        file = tag / chosen.choice((MODEL, shard(0), shard(1)))
        kind = chosen.random()
        if kind < 0.4 and any(one in (f"{file.name}: flip", f"{file.name}: lose_sector") for one in done):
            break  # saved anew, and without a manifest, the first damage would have right sums everywhere
        if kind < 0.4 and file.is_file() and not file.is_symlink():
            try:
                done.append(f"{file.name}: {forge(file, chosen)}")
            except Exception:  # noqa: BLE001 - the first of two damages made it unreadable
                done.append("nothing")
        elif kind < 0.5:
            other = chosen.choice((place / "latest", tag / MANIFEST))
            if other.is_file():
                how = chosen.choice((flip, truncate, append, remove, link, folder, lose_sector))
                how(other, chosen)
                done.append(f"{other.name}: {how.__name__}")
        elif file.is_file() and file.stat().st_size:
            how = chosen.choice(FILE_DAMAGES)
            how(file, chosen)
            done.append(f"{file.name}: {how.__name__}")
    return "; ".join(done)


def damages(rank: int, world_size: int, place: str, job: str, default_s: float) -> list[str]:
    """Findings: what must not happen, each with its seed."""
    engine, findings = old_jobs.make_engine(JOBS[job]), []
    base, good = Path(place), Path(place) / "good"
    old_jobs.train(engine, range(1))
    engine.save_checkpoint(str(base / "early"), tag="older")
    old_jobs.train(engine, range(1, 2))
    engine.save_checkpoint(str(good), tag="a")
    if rank == 0:
        shutil.copytree(base / "early" / "older", good / "older")
    wanted = old_jobs.train(engine, range(2, 4))

    def everyone(own: Any) -> list[Any]:
        found: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(found, own)
        return found

    def next_seed(drawn: Any) -> Any:
        number = [next(drawn, None) if rank == 0 else None]
        torch.distributed.broadcast_object_list(number, src=0)
        return number[0]

    drawn = iter(seeds(default_s, least=15))
    counts = {"refused": 0, "loaded": 0}
    while (seed := next_seed(drawn)) is not None:
        bad, done = base / "bad", ""
        if rank == 0:
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            done = damage(bad, seed)
        done = everyone(done)[0]
        before, loaded = weights(engine), None
        by_name = "latest" not in done
        try:
            loaded, _ = engine.load_checkpoint(str(bad), tag="a" if by_name else None)
            verdict = "loaded" if loaded else "nothing there"
        except Exception as error:  # noqa: BLE001  raw errors are what must not come
            verdict = f"{type(error).__name__}: {error}"
        verdicts = everyone(verdict)
        kinds = {one.split(":")[0] for one in verdicts}
        wrong = None
        if len(kinds) > 1:
            wrong = "ranks differ"
        elif kinds == {"loaded"}:
            counts["loaded"] += 1
            if old_jobs.train(engine, range(2, 4)) != wanted:
                wrong = "loaded with other losses"
        elif kinds == {"nothing there"} and "latest: remove" not in done and "latest: " not in done:
            wrong = "nothing was found, and nobody was reported"
        elif kinds <= {"CheckpointError", "nothing there"}:
            counts["refused"] += 1
            if not torch.equal(before, weights(engine)):
                wrong = "refused, and the weights have changed"
        else:
            wrong = "a raw error"
        wrongs = [one for one in everyone(wrong) if one]
        if wrongs:
            findings.append(f"seed {seed}: {done}: {wrongs[0]}: {verdicts}"[:600])
            engine.load_checkpoint(str(good), tag="a")
    if rank == 0:
        print(f"fuzz {job}: {counts}", flush=True)
        assert os.environ.get("DS_FP8_FUZZ_S") == "0" or all(counts.values()), counts
    return findings


@pytest.mark.parametrize("job", JOBS)
def test_damage_is_refused_or_harmless(tmp_path, job):
    findings = run_ranks(2, damages, str(tmp_path), job, 6.0, timeout_s=36000)[0]
    assert not findings, f"{len(findings)} findings\n" + "\n".join(findings[:25])
