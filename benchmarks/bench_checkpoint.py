"""What do the checks of a checkpoint cost? Saves with and without manifest, whole loads with and without checks.

    python benchmarks/bench_checkpoint.py [--parameters 20] [--repeats 7] [--folder DIR]

What a save costs more is a few ms of hundreds, less than two saves differ by. So it is measured within each save: the
time spent in the functions that write stamp, manifest, mark and `latest`, over that save's whole time, both by the
clock (`share of the save`); a slow moment of the machine makes both longer. `without` stands beside it.

One rank, ZeRO 2, O2, fp8: about 20 bytes per parameter on the disk. `without` is DeepSpeed's own save of the same
engine, our exact states in it. The folder is in memory (/dev/shm) where there is one: the disk then costs least, and
the checks count most. A load that is `unchecked` is the same one where `inspect` reads nothing; `checked` has the
CRC-32 of every record, decodes masters and moments to compare them, and gives DeepSpeed the files that it has read.

Goals: at most 2 % of a save is the manifest's; the CRC-32 of a load is at least 0.5 GB/s a core.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import Report, alternate


def make_engine(millions: int) -> Any:
    """An engine of about so many parameters, after one step."""
    import deepspeed
    from torch import nn

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    width = 1024
    blocks = [
        nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(millions // 8)
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}, "zero_optimization": {"stage": 2},
        "fp8": {"enabled": True}, "msamp": {"enabled": True, "opt_level": "O2"},
    }  # fmt: skip
    engine = deepspeed.initialize(model=nn.Sequential(*blocks), config=config)[0]
    engine.backward(engine(torch.randn(16, width).bfloat16()).float().square().mean())
    engine.step()
    return engine


class Share:
    """The part of each save that is spent in functions of ours that only the manifest needs."""

    def __init__(self) -> None:
        self.depth, self.spent_s = 0, 0.0
        self.parts: list[float] = []

    def watch(self, home: Any, name: str) -> None:
        original = getattr(home, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            begun = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.depth -= 1
                self.spent_s += 0.0 if self.depth else time.perf_counter() - begun  # one within another counts once

        setattr(home, name, timed)

    def of(self, save: Callable[[], Any]) -> None:
        self.spent_s, begun = 0.0, time.perf_counter()
        save()
        self.parts.append(self.spent_s / (time.perf_counter() - begun))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=16, help="millions, in steps of 8")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm") if Path("/dev/shm").is_dir() else None)
    options = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
    os.environ.setdefault("MASTER_PORT", "29571")
    from ds_fp8.checkpoint import inspect as _inspect  # noqa: F401  (imports what a load needs, before the clock runs)
    from ds_fp8.checkpoint import loading, manifest, records, saving, stamp

    engine = make_engine(options.parameters)
    share = Share()
    for name in ("_begin", "_described", "_finish", "_replace", "_all_or_none", "count_states"):
        share.watch(saving, name)
    share.watch(stamp, "new_stamp")
    with_manifest = saving.save_checkpoint

    def without(original: Any, engine: Any, stamp: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=options.folder) as name:
        folder = Path(name)

        def save(how: Any, tag: str) -> None:
            saving.save_checkpoint = how
            engine.save_checkpoint(str(folder), tag=tag)

        saved = alternate(
            {
                "with manifest": lambda: share.of(lambda: save(with_manifest, "with")),
                "without": lambda: save(without, "without"),
            },
            repeats=options.repeats,
        )
        tag = folder / "with"
        files = sorted(tag.glob("*.pt"))
        total = sum(file.stat().st_size for file in files)
        assert (tag / manifest.MANIFEST).is_file() and not (folder / "without" / manifest.MANIFEST).exists()
        shutil.rmtree(folder / "without")
        read = alternate(
            {
                "CRC-32 of every record": lambda: [records.check_records(file) for file in files],
                "torch.load": lambda: [torch.load(file, weights_only=False) for file in files],
                "digest of the directories": lambda: [manifest.directory_digest(file) for file in files],
            },
            repeats=options.repeats,
        )
        checked = loading.inspect

        def load(how: Any) -> None:
            loading.inspect = how
            assert engine.load_checkpoint(str(folder), tag="with")[0] is not None

        loaded = alternate(
            {"checked": lambda: load(checked), "unchecked": lambda: load(lambda *given, **named: {})},
            repeats=options.repeats,
        )
    report = Report("checkpoint", "What do the checks of a checkpoint cost?")
    case = f"{total / 1e6:.0f} MB, {sum(p.numel() for p in engine.module.parameters()) / 1e6:.0f}M parameters"
    for contestant, timing in saved.items():
        report.timing(contestant, f"save, {case}", timing, value=timing.median_s * 1e3, unit="ms")
    for contestant, timing in read.items():
        report.timing(contestant, f"read, {case}", timing, value=timing.median_s * 1e3, unit="ms")
    for contestant, timing in loaded.items():
        report.timing(contestant, f"load, {case}", timing, value=timing.median_s * 1e3, unit="ms")
    parts = share.parts[-options.repeats :]
    more = saved["with manifest"].median_s / saved["without"].median_s - 1
    report.goal("a save with manifest: share of the save", result=100 * median(parts), goal=2.0, unit="%", at_most=True)
    report.note(f"that share in {len(parts)} saves: {100 * min(parts):.3f} to {100 * max(parts):.3f} %")
    report.note(f"medians of whole saves, with manifest beyond without: {100 * more:+.1f} %; mind their spread")
    rate = total / read["CRC-32 of every record"].median_s / 1e9
    report.goal(
        "CRC-32 of a load",
        result=rate,
        goal=0.5,
        unit="GB/s",
        reason="the CRC-32 is zlib's, on one core; see torch.load beside it",
        peer=f"torch.load {total / read['torch.load'].median_s / 1e9:.2f} GB/s",
    )
    report.note("the CRC-32s that the manifest and the load rely on are torch.save's own: they are in `without` too")
    report.write()


if __name__ == "__main__":
    main()
