"""Does the loss curve lie on the bf16 curve? The example, trained for real in every recipe, level and ZeRO stage.

    python benchmarks/bench_training.py --set recipes levels stages --seeds 1 2 3 --steps 150 --out runs/training

Each run is `examples/train_gpt.py` under the real `deepspeed` launcher on two ranks; cases differ in their JSON alone.
A finished run is not repeated, so an interrupted series goes on where it stopped. The gap is eval loss minus that of
bf16 with the same seed and stage: it is judged by its size beside what bf16 itself does over seeds and over stages, not
by its sign.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from harness import RESULTS, cpu_name, hardware_slug, versions

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "examples" / "ds_bf16.json"
DELAYED = {"enabled": True, "recipe": "delayed", "fp8_format": "HYBRID"}


def msamp(level: str, **more: Any) -> dict[str, Any]:
    return {"fp8": DELAYED, "msamp": {"enabled": True, "opt_level": level, **more}}


SECTIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8 delayed": {"fp8": DELAYED},
    "fp8 current": {"fp8": {**DELAYED, "recipe": "current"}},
    "fp8 block": {"fp8": {"enabled": True, "recipe": "block", "fp8_format": "E4M3"}},
    "O1": msamp("O1"),
    "O2": msamp("O2"),
    "O3": msamp("O3"),
    "O3 expanded": msamp("O3", exp_avg="e4m3_expanded", exp_avg_sq="e4m3_expanded"),
}
SETS: dict[str, list[tuple[str, int, int]]] = {
    "recipes": [(name, 2, 1) for name in ("bf16", "fp8 delayed", "fp8 current", "fp8 block")],
    "levels": [(name, 2, 1) for name in ("bf16", "O1", "O2", "O3", "O3 expanded")],
    "stages": [(name, stage, 1) for stage in (0, 1, 3) for name in ("bf16", "fp8 delayed", "fp8 current", "fp8 block")],
    "wire": [
        (name, stage, gas)
        for gas in (1, 8)
        for stage in (0, 1, 2, 3)
        for name in ("bf16", "O2", "O3")
        if (name, stage) != ("O3", 0)
    ],
}
"""Name of the sections, ZeRO stage, gradient accumulation."""
LAST = 20
"""Steps at the end over which the training loss is averaged."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def run(name: str, stage: int, gas: int, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """Train one case, or read what an earlier call left; returns its metrics."""
    folder = out / f"{name.replace(' ', '_')}_zero{stage}_gas{gas}_seed{seed}_{steps}"
    metrics = folder / "metrics.json"
    if not metrics.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads(BASE.read_text()) | SECTIONS[name]
        config["zero_optimization"] = {"stage": stage}
        # The same tokens per step whatever the accumulation.
        config["gradient_accumulation_steps"] = gas
        config["train_micro_batch_size_per_gpu"] = 8 // gas if gas < 8 else 1
        file = folder / "ds.json"
        file.write_text(json.dumps(config, indent=1))
        script = [str(ROOT / "examples" / "train_gpt.py"), "--deepspeed_config", str(file), "--out", str(folder)]
        command = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), *script]
        command += ["--steps", str(steps), "--seed", str(seed), "--eval-every", str(max(steps // 6, 1))]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        with (folder / "log").open("w") as log:
            code = subprocess.run(
                command, check=False, env=environment, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        if code:
            raise SystemExit(f"{name}, stage {stage}: exit code {code}; the log is {folder / 'log'}")
    return json.loads(metrics.read_text())


def series(cases: list[tuple[str, int, int]], seeds: list[int], steps: int, out: Path) -> dict[Any, list[dict]]:
    """Every case with every seed; one JSON line each."""
    found: dict[Any, list[dict]] = defaultdict(list)
    for seed in seeds:
        for name, stage, gas in cases:
            metrics = run(name, stage, gas, seed, steps, out)
            found[name, stage, gas].append(metrics)
            row = {"bench": "training", "case": name, "stage": stage, "gas": gas, "seed": seed}
            row |= {"eval_loss": metrics["eval_loss"], "steps_per_s": metrics["steps_per_s"]}
            print(json.dumps(row), flush=True)
    return found


def late_loss(metrics: dict[str, Any]) -> float:
    """Mean training loss over the last steps."""
    return statistics.mean(loss for _, loss in metrics["curve"]["train"][-LAST:])


def table(found: dict[Any, list[dict]]) -> list[str]:
    """Markdown rows: eval loss of every seed, mean gaps to bf16 of the same stage, steps/s.

    The training loss of the last steps is the steadier of the two: many batches, and the same ones for both.
    """
    lines = [
        (
            f"| case | ZeRO | gas | eval loss by seed | mean gap to bf16 | training loss of the last {LAST}, gap | "
            "steps/s |"
        )
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for (name, stage, gas), runs in found.items():
        losses = [each["eval_loss"] for each in runs]
        base = [each["eval_loss"] for each in found.get(("bf16", stage, gas), [])]
        gaps = [loss - baseline for loss, baseline in zip(losses, base, strict=False)]
        gap = f"{statistics.mean(gaps):+.4f}" if gaps and name != "bf16" else "-"
        late = [
            late_loss(each) - late_loss(baseline)
            for each, baseline in zip(runs, found.get(("bf16", stage, gas), []), strict=False)
        ]
        drift = f"{statistics.mean(late):+.4f}" if late and name != "bf16" else "-"
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        speed = statistics.median(each["steps_per_s"] for each in runs)
        lines.append(f"| {name} | {stage} | {gas} | {shown} | {gap} | {drift} | {speed:.2f} |")
    return lines


def yardstick(found: dict[Any, list[dict]]) -> list[str]:
    """What bf16 does by itself: its spread over seeds, and over stages, where nothing but the order of sums differs."""
    baseline = [[run["eval_loss"] for run in runs] for (name, *_), runs in found.items() if name == "bf16"]
    lines = []
    if baseline and len(baseline[0]) > 1:
        lines += [
            "",
            f"bf16 itself spreads by {statistics.stdev(baseline[0]):.4f} (standard deviation) over its seeds.",
        ]
    if len(baseline) > 1:
        apart = [max(losses) - min(losses) for losses in zip(*baseline, strict=True)]
        shown = ", ".join(f"{gap:.4f}" for gap in apart)
        lines += [
            "",
            f"With one seed, bf16 differs by {shown} between these stages and accumulations, where only the order",
        ]
        lines += ["of sums differs: a gap of that size says nothing about a format."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", choices=sorted(SETS), default=["recipes", "levels"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "training")
    options = parser.parse_args()
    cases = list(dict.fromkeys(case for name in options.set for case in SETS[name]))
    found = series(cases, options.seeds, options.steps, options.out.resolve())
    now = datetime.now(timezone.utc)
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [f"# {__doc__.splitlines()[0]}", "", f"{now:%Y-%m-%d}, {cpu_name()}, {os.cpu_count()} cores, 2 ranks"]
    lines += [f"{software}  ", f"`python benchmarks/bench_training.py {' '.join(sys.argv[1:])}`", "", *table(found)]
    lines += yardstick(found)
    file = RESULTS / f"training_{'-'.join(options.set)}_{hardware_slug()}_{now:%Y%m}.md"
    file.write_text("\n".join(lines) + "\n")
    print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
