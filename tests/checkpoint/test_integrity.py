"""Damage of every kind: refused by all ranks before anything changes, or harmless. Nothing loads in silence.

Bit flips anywhere in the files, wrong values in our own entries, files of another save, shards renamed into each other,
ranks that would load different things. The control is the engine itself: its weights and its next loss are what they
were.
"""

from __future__ import annotations

import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import old_jobs
import pytest
import torch
from ranks import run_ranks

from ds_fp8.checkpoint.complete import look
from ds_fp8.checkpoint.manifest import MANIFEST

pytestmark = pytest.mark.dist

JOB = {
    "stage": 2,
    "fp8": {"recipe": "delayed", "amax_history_len": 4},
    "msamp": {"opt_level": "O2"},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1e-2}},
}
MODEL = "mp_rank_00_model_states.pt"


def shard(rank: int) -> str:
    return f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def flip(path: Path, seed: int) -> None:
    """One bit of the data of one record, the archive's directory left alone."""
    chosen = random.Random(seed)
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if record.file_size > 64 and "data/" in record.filename]
    record = chosen.choice(records)
    content = bytearray(path.read_bytes())
    name_and_extra = content[record.header_offset + 26] + 256 * content[record.header_offset + 27]
    name_and_extra += content[record.header_offset + 28] + 256 * content[record.header_offset + 29]
    at = record.header_offset + 30 + name_and_extra + chosen.randrange(record.file_size)
    content[at] ^= 1 << chosen.randrange(8)
    path.write_bytes(content)


def edit(path: Path, change: Any) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def entry(change: Any) -> Any:
    """Damage to our entry of a shard."""
    return lambda path: edit(path, lambda content: change(content["optimizer_state_dict"]["ds_fp8"]))


def scales(change: Any) -> Any:
    """Damage to the layers' FP8 state in the model file."""
    return lambda path: edit(path, lambda content: change(content["ds_fp8"]))


def set_item(*path: Any, value: Any) -> Any:
    def change(node: Any) -> None:
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


def drop(*path: Any) -> Any:
    def change(node: Any) -> None:
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return change


def scaled(*path: Any, factor: float) -> Any:
    def change(node: Any) -> None:
        for key in path:
            node = node[key]
        node.mul_(factor)

    return change


SHARD_DAMAGE = {
    **{f"bit flip {seed}": lambda path, seed=seed: flip(path, seed) for seed in range(4)},
    **{f"{key} is None": entry(set_item(key, value=None)) for key in ("version", "layout", "codes", "seed")},
    "version is text": entry(set_item("version", value="2")),
    "layout is empty": entry(set_item("layout", value={})),
    "numel is wrong": entry(set_item("layout", "numel", value=[7])),
    "a partition is None": entry(set_item("codes", 0, value=None)),
    "a partition lacks its step": entry(drop("codes", 0, "step")),
    "a negative step": entry(set_item("codes", 0, "step", value=-1)),
    "formats is text": entry(set_item("codes", 0, "formats", value="O2")),
    "an unknown format": entry(set_item("codes", 0, "formats", "exp_avg", value="int4")),
    "an unknown dtype": entry(set_item("codes", 0, "dtype", value="fp12")),
    "a tensor is missing": entry(drop("codes", 0, "tensors", "exp_avg.data")),
    "a tensor is a list": entry(set_item("codes", 0, "tensors", "exp_avg.data", value=[1])),
    "a tensor is short": entry(set_item("codes", 0, "tensors", "exp_avg.data", value=torch.zeros(3, dtype=torch.int8))),
    "a weight is short": entry(set_item("codes", 0, "weight", value=torch.zeros(3, dtype=torch.bfloat16))),
    "negative scales": entry(scaled("codes", 0, "tensors", "exp_avg.scale_inv", factor=-1.0)),
    "masters changed": entry(scaled("codes", 0, "weight", factor=1.5)),
    "another save": entry(set_item("save", "id", value="0123456789abcdef")),
    "fp32 values changed": lambda path: edit(
        path, lambda content: content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].mul_(2)
    ),
}


def shard_value(*path: Any, value: Any) -> Any:
    """Damage to what DeepSpeed itself keeps in a shard."""
    return lambda path_: edit(path_, set_item("optimizer_state_dict", *path, value=value))


BASE = ("base_optimizer_state",)
GROUP = (*BASE, "param_groups", 0)
STATE = (*BASE, "state", 0)
NOT_A_NUMBER = float("nan")
SHARD_DAMAGE |= {
    "exact moments changed": entry(
        lambda kept: kept["codes"][0]["tensors"]["exp_avg.data"].copy_(
            kept["codes"][0]["tensors"]["exp_avg.data"].flip(0)
        )
    ),
    "scales of moments are NaN": entry(scaled("codes", 0, "tensors", "exp_avg.scale_inv", factor=NOT_A_NUMBER)),
    "scales of moments are huge": entry(scaled("codes", 0, "tensors", "exp_avg_sq.scale_inv", factor=1e30)),
    "a step more": entry(lambda kept: kept["codes"][0].update(step=kept["codes"][0]["step"] + 1)),
    "another seed": entry(set_item("seed", value=7)),
    "another layout": entry(set_item("layout", "stage", value=1)),
    "fp32 moments changed": lambda path: edit(
        path, lambda content: content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"].mul_(2)
    ),
    "fp32 moments are gone": shard_value(*BASE, "state", value={}),
    "fp32 moments are on meta": shard_value(*STATE, "exp_avg", value=torch.empty(3, device="meta")),
    "the fp32 step is text": shard_value(*STATE, "step", value="three"),
    "the optimizer is a list of nothing": shard_value(*BASE, value=[None]),
    "no parameter groups": shard_value(*BASE, "param_groups", value=None),
    "a group without parameters": shard_value(*GROUP, "params", value=[]),
    "a learning rate of None": shard_value(*GROUP, "lr", value=None),
    "a negative learning rate": shard_value(*GROUP, "lr", value=-1.0),
    "a learning rate of NaN": shard_value(*GROUP, "lr", value=NOT_A_NUMBER),
    "one beta": shard_value(*GROUP, "betas", value=[0.9]),
    "bias correction is text": shard_value(*GROUP, "bias_correction", value="yes"),
    "foreach is three": shard_value(*GROUP, "foreach", value=3),
    "a version that is none": shard_value("ds_version", value="newest"),
    "a clip that is text": shard_value("clip_grad", value="1"),
    "another alignment": shard_value("param_alignment_paddings", value=[[99]]),
}
MODEL_DAMAGE = {
    **{f"bit flip {seed}": lambda path, seed=seed: flip(path, seed) for seed in range(3)},
    **{f"{key} is None": scales(set_item(key, value=None)) for key in ("version", "books", "book_of_rank")},
    "scales of zero": scales(scaled("books", 0, "scales", factor=0.0)),
    "negative scales": scales(scaled("books", 0, "scales", factor=-1.0)),
    "a layer twice": scales(lambda kept: kept["books"][0]["names"].__setitem__(0, kept["books"][0]["names"][1])),
    "negative steps": scales(set_item("books", 0, "steps", value=-3)),
    "a short history": scales(lambda kept: kept["books"][0].update(forward_history=torch.zeros(4, 1))),
    "a list for scales": scales(lambda kept: kept["books"][0].update(scales=[1.0])),
    "ranks without scales": scales(set_item("book_of_rank", value=[0, 7])),
    "histories changed": scales(scaled("books", 0, "forward_history", factor=0.5)),
    "layers renamed": scales(lambda kept: kept["books"][0]["names"].reverse()),
    "steps are text": lambda path: edit(path, lambda content: content.update(global_steps="two")),
    "negative samples": lambda path: edit(path, lambda content: content.update(global_samples=-1)),
    "no skipped steps": lambda path: edit(path, lambda content: content.pop("skipped_steps")),
    "of another world": lambda path: edit(path, lambda content: content.update(dp_world_size=3)),
    "one of two model files": lambda path: edit(path, lambda content: content.update(mp_world_size=2)),
    "no scheduler": lambda path: edit(path, lambda content: content.update(lr_scheduler=None)),
    "a scheduler without its step": lambda path: edit(path, lambda content: content["lr_scheduler"].clear()),
    "a scheduler's step is text": lambda path: edit(
        path, lambda content: content["lr_scheduler"].update(last_batch_iteration="one")
    ),
    "a weight is a list": lambda path: edit(path, lambda content: content["module"].update({"0.weight": [1.0]})),
    "a weight is sparse": lambda path: edit(
        path, lambda content: content["module"].update({"0.weight": content["module"]["0.weight"].float().to_sparse()})
    ),
    "another shape": lambda path: edit(path, lambda content: content["module"].update({"0.weight": torch.zeros(3, 3)})),
    "another model": lambda path: edit(path, lambda content: content["module"].pop("0.weight")),
    "no module": lambda path: edit(path, lambda content: content.pop("module")),
    "module is a list": lambda path: edit(path, lambda content: content.update(module=[1])),
}


def weights(engine: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().float().reshape(-1) for parameter in engine.module.parameters()])


def swap(good: Path, swapped: Path) -> None:
    """A copy whose two shards are renamed into each other."""
    shutil.copytree(good, swapped)
    (swapped / "a" / shard(0)).rename(swapped / "a" / "kept")
    (swapped / "a" / shard(1)).rename(swapped / "a" / shard(0))
    (swapped / "a" / "kept").rename(swapped / "a" / shard(1))


OWNER_DAMAGE: dict[str, Any] = {
    "renamed into each other": swap,
    "a shard of another save": lambda good, bad: shutil.copy(
        shutil.copytree(good, bad).parent / "early" / "a" / shard(1), bad / "a" / shard(1)
    ),
    "an entry that is a list": lambda good, bad: edit(
        shutil.copytree(good, bad) / "a" / shard(1), lambda content: content.update(ds_fp8=[1])
    ),
    "a rank that is text": lambda good, bad: edit(
        shutil.copytree(good, bad) / "a" / shard(1), lambda content: content["ds_fp8"].update(rank="1")
    ),
}
"""With `fp8` alone, where the states in a shard are DeepSpeed's own: what the entry beside them tells."""


def try_owners(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Each of OWNER_DAMAGE: (message, weights unchanged, what `look` says of the folder)."""
    engine = old_jobs.make_engine({key: value for key, value in JOB.items() if key != "msamp"})
    results: dict[str, Any] = {}
    for number, name in enumerate(("early", "good")):
        old_jobs.train(engine, range(number, number + 1))
        engine.save_checkpoint(str(Path(folder) / name), tag="a")
        if rank == 0:
            (Path(folder) / name / "a" / MANIFEST).unlink()
    good = Path(folder) / "good"
    wanted = old_jobs.train(engine, range(2, 4))
    for number, (name, damage) in enumerate(OWNER_DAMAGE.items()):
        bad = Path(folder) / f"bad{number}"
        if rank == 0:
            damage(good, bad)
        torch.distributed.barrier()
        before = weights(engine)
        try:
            engine.load_checkpoint(str(bad))
            message = "loaded"
        except Exception as error:  # noqa: BLE001  # raw errors are what must not come
            message = f"{type(error).__name__}: {error}"
        results[name] = (message, torch.equal(before, weights(engine)), look(bad / "a").faults)
    engine.load_checkpoint(str(good))
    results["good"] = (old_jobs.train(engine, range(2, 4)) == wanted, look(good / "a").faults)
    return results


def try_damage(rank: int, world_size: int, folder: str) -> dict[str, tuple[str, bool]]:
    engine = old_jobs.make_engine(JOB)
    old_jobs.train(engine, range(1))
    good = Path(folder) / "good"
    engine.save_checkpoint(str(good), tag="a")
    if rank == 0:  # it would see every one of these first (test_fallback.py): here a checkpoint from before manifests
        (good / "a" / MANIFEST).unlink()
    old_jobs.train(engine, range(1, 2))
    before, results = weights(engine), {}

    def attempt(name: str, prepare: Any, load_dir: Path, tag: Any = None) -> None:
        if rank == 0:
            prepare()
        torch.distributed.barrier()
        try:
            engine.load_checkpoint(str(load_dir), tag=tag)
            message = "loaded"
        except Exception as error:  # noqa: BLE001  # raw errors are what must not come
            message = f"{type(error).__name__}: {error}"
        results[name] = (message, torch.equal(before, weights(engine)))
        torch.distributed.barrier()

    for file, damages in ((shard(1), SHARD_DAMAGE), (MODEL, MODEL_DAMAGE)):
        for name, damage in damages.items():
            bad = Path(folder) / "bad"

            def prepare(bad: Path = bad, file: str = file, damage: Any = damage) -> None:
                shutil.rmtree(bad, ignore_errors=True)
                shutil.copytree(good, bad)
                damage(bad / "a" / file)

            attempt(f"{file}: {name}", prepare, bad)

    swapped = Path(folder) / "swapped"
    attempt("renamed into each other", lambda: swap(good, swapped), swapped)

    engine.save_checkpoint(str(Path(folder) / "later"), tag="a")
    mixed = Path(folder) / "mixed"

    def mix() -> None:
        shutil.copytree(good, mixed)
        for number in (0, 1):
            shutil.copy(Path(folder) / "later" / "a" / shard(number), mixed / "a" / shard(number))

    attempt("optimizer of another step", mix, mixed)
    # A node with a folder of its own: `latest` differs, or there is nothing at all.
    own = Path(folder) / f"node{rank}"
    shutil.copytree(good, own)
    if rank == 1:
        (own / "a").rename(own / "b")
        (own / "latest").write_text("b")
    attempt("latest differs", lambda: None, own)
    attempt(
        "exists on one rank only", lambda: None, Path(folder) / "node0" if rank == 0 else Path(folder) / "none", "a"
    )
    path, _ = engine.load_checkpoint(str(good))
    results["good"] = (str(path is not None), True)
    results["resumed"] = (repr(old_jobs.train(engine, range(1, 3))), True)
    engine.destroy()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(2, try_damage, str(tmp_path_factory.mktemp("damage")), timeout_s=600)


NAMES = [f"{shard(1)}: {name}" for name in SHARD_DAMAGE] + [f"{MODEL}: {name}" for name in MODEL_DAMAGE]
WORDS = {
    "renamed into each other": "renamed into each other",
    "optimizer of another step": "files of 2 saves",
    "latest differs": "would load different checkpoints",
    "exists on one rank only": "is not there for rank 1",
}


@pytest.mark.parametrize("name", [*NAMES, *WORDS])
def test_every_rank_refuses_and_nothing_changes(results, name):
    for of_rank in results:
        message, unchanged = of_rank[name]
        assert message.startswith("CheckpointError: "), message
        assert WORDS.get(name, "") in message
        assert unchanged


def test_the_undamaged_one_loads_after_all_that(results):
    assert all(of_rank["good"] == ("True", True) for of_rank in results)
    assert results[0]["resumed"] == results[1]["resumed"]


def test_shards_of_deepspeed_say_whose_they_are(tmp_path):
    """`fp8` alone, no manifest: a shard at another rank's place, or of another save, is refused, and seen offline."""
    for of_rank in run_ranks(2, try_owners, str(tmp_path)):
        for name in OWNER_DAMAGE:
            message, unchanged, _ = of_rank[name]
            assert message.startswith("CheckpointError: ") and unchanged, (name, message)
        assert "renamed into each other" in of_rank["renamed into each other"][0]
        assert "holds the states of rank 1" in of_rank["renamed into each other"][2][0]
        assert "files of 2 saves" in of_rank["a shard of another save"][0]
        assert of_rank["a shard of another save"][2] == ("made of files of 2 saves",)
        assert of_rank["good"] == (True, ())
