"""A save that is killed while it writes over a tag, and a job that goes on from the newest complete checkpoint.

With `fp8` alone, where the optimizer's shards are DeepSpeed's own and carry nothing of ours: only manifest and mark can
tell that a tag holds files of two steps. The control is the engine: weights after a refusal, losses after a load.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import old_jobs
import pytest
from ranks import run_ranks
from test_integrity import MODEL, flip, shard, weights

from ds_fp8.checkpoint.complete import look, named_by_latest
from ds_fp8.checkpoint.manifest import MANIFEST, UNFINISHED

pytestmark = [pytest.mark.dist, pytest.mark.slow]

JOB = {"stage": 2, "fp8": {"recipe": "delayed", "amax_history_len": 4}}
FALLBACK = {"stage": 2, "fp8": {**JOB["fp8"], "checkpoint_fallback": True}}


def save_and_die(rank: int, world_size: int, folder: str) -> None:
    """Tags `old` (1 step), `last` (2 steps); then `last` again after 3 steps, killed by SIGKILL in the half of rank 1's
    shard.
    """
    engine = old_jobs.make_engine(JOB)
    old_jobs.train(engine, range(1))
    engine.save_checkpoint(folder, tag="old")
    losses = old_jobs.train(engine, range(1, 2))
    engine.save_checkpoint(folder, tag="last")
    losses += old_jobs.train(engine, range(2, 3))
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))
        shutil.copytree(folder, f"{folder}_whole")
    else:
        writer = engine.checkpoint_engine
        original = writer.save

        def save(state: Any, path: str, *args: Any, **kwargs: Any) -> Any:
            result = original(state, path, *args, **kwargs)
            if "optim_states" in path:
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        writer.save = save
    engine.save_checkpoint(folder, tag="last")


def swap_shard(folder: Path) -> None:
    shutil.copy(folder / "old" / shard(1), folder / "last" / shard(1))


def forget_shard(folder: Path) -> None:
    """As a save by one rank leaves it, over the tag of two: a shard that is nobody's."""
    manifest = json.loads((folder / "last" / MANIFEST).read_text())
    del manifest["files"][shard(1)]
    (folder / "last" / MANIFEST).write_text(json.dumps(manifest))


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of a shard": (lambda folder: flip(folder / "last" / shard(1), 3), "CRC32"),
    "a bit of the model": (lambda folder: flip(folder / "last" / MODEL, 3), "CRC32"),
    "a shard of another step": (swap_shard, "another save's"),
    "a shard that is nobody's": (forget_shard, "not of this save"),
    "a shard is missing": (lambda folder: (folder / "last" / shard(0)).unlink(), "missing"),
    "an empty shard": (lambda folder: (folder / "last" / shard(0)).write_bytes(b""), "0 bytes"),
    "a save under way": (lambda folder: (folder / "last" / UNFINISHED).touch(), "broken off"),
    "a manifest of garbage": (lambda folder: (folder / "last" / MANIFEST).write_bytes(b"\xff{"), "cannot be read"),
    "the tag is gone": (lambda folder: shutil.rmtree(folder / "last"), "not there"),
    "latest is empty": (lambda folder: (folder / "latest").write_text(""), "names no checkpoint"),
    "latest is garbage": (lambda folder: (folder / "latest").write_bytes(b"\xff\x00\xfe"), "names no checkpoint"),
    "no latest": (lambda folder: (folder / "latest").unlink(), "not there"),
}
FOUND = {"latest is empty": 2, "latest is garbage": 2, "no latest": 2}
"""Steps of what is loaded where it is not the older tag."""


def try_loads(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    import contextlib
    import io

    from torch.distributed import barrier

    results: dict[str, Any] = {}
    baseline, falling = old_jobs.make_engine(JOB), old_jobs.make_engine(FALLBACK)

    def attempt(engine: Any, load_dir: Path, tag: str | None = None) -> tuple[Any, ...]:
        before, said = weights(engine), io.StringIO()
        with contextlib.redirect_stdout(said):
            try:
                path, _ = engine.load_checkpoint(str(load_dir), tag=tag)
                result = Path(path).parent.name if path else "nothing"
            except Exception as error:  # noqa: BLE001  raw errors are what must not come
                result = f"{type(error).__name__}: {error}"
        barrier()
        lines = [line for line in said.getvalue().splitlines() if line.startswith("ds_fp8: ")]
        return result, bool((before == weights(engine)).all()), engine.global_steps, lines

    broken, bad = Path(folder), Path(folder + "_bad")
    results["broken unmodified"] = attempt(baseline, broken)
    results["broken unmodified by name"] = attempt(baseline, broken, "last")
    results["broken falling by name"] = attempt(falling, broken, "last")
    results["broken falling"] = attempt(falling, broken)
    results["losses"] = old_jobs.train(falling, range(1, 3))
    for name, (damage, _) in DAMAGES.items():
        if rank == 0:
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(f"{folder}_whole", bad)
            damage(bad)
        barrier()
        # Without a `latest` DeepSpeed finds nothing and goes on from the start, as it always did.
        results[f"{name} unmodified"] = attempt(baseline, bad, "last" if name == "no latest" else None)
        results[f"{name} falling"] = attempt(falling, bad)
    own = Path(f"{folder}_node{rank}")
    shutil.copytree(f"{folder}_whole", own)
    if rank == 1:
        shutil.rmtree(own / "last")
        (own / "latest").write_text("old")
    results["nodes falling"] = attempt(falling, own)
    if rank == 0:
        remove_all(bad)
    barrier()
    results["first start"] = attempt(falling, bad)
    if rank == 0:
        shutil.copytree(broken / "last", bad / "last")
    barrier()
    results["nothing whole"] = attempt(falling, bad)
    return results


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fallback") / "ckpt"
    with pytest.raises(Exception, match=r"[Cc]onnection|[Cc]losed|peer"):
        run_ranks(2, save_and_die, str(folder))
    return folder


@pytest.fixture(scope="module")
def results(broken) -> list[dict[str, Any]]:
    return run_ranks(2, try_loads, str(broken), timeout_s=280)


def test_killed_while_it_writes_over_a_tag(broken):
    """The tag is marked, has no manifest, and is nobody's choice; the older one is whole."""
    assert (broken / "last" / UNFINISHED).exists() and not (broken / "last" / MANIFEST).exists()
    assert not look(broken / "last").complete and look(broken / "old").complete
    assert named_by_latest(broken) == "last"


@pytest.mark.parametrize("name", ["broken unmodified", "broken unmodified by name", "broken falling by name"])
def test_files_of_two_steps_are_refused(results, name):
    """Without the key, and whenever the script names the tag: an error on both ranks, the engine untouched."""
    for of_rank in results:
        result, unchanged, _, _ = of_rank[name]
        assert result.startswith("CheckpointError: ") and "broken off" in result
        assert unchanged


def test_the_newest_complete_one_is_loaded_and_told(results, broken):
    """Rank 0 says so in one line; the losses are those of the run that was killed, from the older checkpoint on."""
    assert [of_rank["broken falling"][0] for of_rank in results] == ["old", "old"]
    shown = [line for line in results[0]["broken falling"][3] if "checkpoint_fallback" in line]
    assert len(shown) == 1 and "broken off" in shown[0] and "Loaded old instead" in shown[0]
    assert not any("checkpoint_fallback" in line for line in results[1]["broken falling"][3])
    assert results[0]["losses"] == json.loads((broken / "losses.json").read_text())


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage(results, name):
    """Refused without the key; with it the newest complete one is loaded by both ranks."""
    for of_rank in results:
        result, unchanged, _, _ = of_rank[f"{name} unmodified"]
        if name == "no latest":
            assert result == "last"
        else:
            assert result.startswith("CheckpointError: ") and DAMAGES[name][1] in result, result
            assert unchanged
        result, _, step, _ = of_rank[f"{name} falling"]
        assert result == ("last" if name in FOUND else "old") and step == FOUND.get(name, 1), result
    assert sum("checkpoint_fallback" in line for line in results[0][f"{name} falling"][3]) == 1


def test_a_node_with_an_older_copy(results):
    """The newest one that *all* ranks have."""
    assert [of_rank["nodes falling"][0] for of_rank in results] == ["old", "old"]


def test_nothing_to_fall_back_to(results):
    """An empty folder is a first start; a folder with nothing whole is an error."""
    for of_rank in results:
        assert of_rank["first start"][0] == "nothing"
        result, unchanged, _, _ = of_rank["nothing whole"]
        assert result.startswith("CheckpointError: ") and "no other complete checkpoint" in result
        assert unchanged
