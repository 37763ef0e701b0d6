"""Every measurement that needs a GPU, in resumable measurements of at most ten minutes.

    python3 benchmarks/gpu/run_all.py --list
    python3 benchmarks/gpu/run_all.py --measurements env,golden --budget 500

Each measurement is a script beside this one, run in its own process with a share of the budget. Results go to the
folder `--out` (default: `$OUT`, else `benchmarks/results/gpu`): `results.json` and `results.md`, and what a measurement
keeps besides (golden vectors). A measurement that is done there, or under `--resume FOLDER`, is not run again unless
`--again` is given; a measurement that ran out of time is. Without a CUDA device every measurement says so and is marked
skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

MEASUREMENTS = {
    "env": "versions, FP8 support, torch._scaled_mm variants, cast behaviour, copy bandwidth",
    "golden": "more golden vectors of Transformer Engine",
    "tests": "pytest -m gpu",
    "optimizer": "O2 step in Triton against torch AdamW(fused), TE FusedAdam and the copy bandwidth",
    "linear": "one linear layer 4096 x 4096, forward and backward, by number of tokens and backend",
    "profile": "where the time of one linear pass goes, on the device and on the host",
    "block": "one GPT block of width 4096, 16K tokens",
    "moe": "the expert blocks of Mixtral, gpt-oss and Qwen3-30B-A3B, forward and backward, FP8 beside bf16",
    "moe_parts": "each cast and each product of these blocks alone",
    "lora": "LoRA on 8B-width layers under ZeRO-2, the frozen base in FP8 and in FP8 alone, beside bf16",
    "gpt": "GPT of 1.25B parameters under ZeRO-2: tokens/s and memory for bf16, fp8, O1, O2, O3",
    "llama": "transformers' Llama of 8B width and of 1B under ZeRO-2, eager and compiled; torchao; Accelerate",
    "largest": "largest model that trains on the card, bf16 against O3 with expanded states",
    "wire": "two ranks on one device over gloo, and NCCL as far as one device lets it",
    "nccl": "several GPUs over NCCL: one exchange against NCCL's own, and the GPT in ZeRO-2 and ZeRO-3",
    "hooks": "time that our hooks add to a step without FP8 work",
}
"""Measurement -> question. The script is `measure_<name>.py`; to add a measurement, add the file and a line here."""


def versions() -> dict[str, str]:
    """Everything a result depends on; `-` where a package is not installed."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    names = {"torch": ("torch",), "triton": ("triton",), "deepspeed": ("deepspeed",), "accelerate": ("accelerate",)}
    names |= {"transformer_engine": ("transformer-engine", "transformer_engine")}
    for name, candidates in names.items():
        found[name] = "-"
        for candidate in candidates:
            try:
                found[name] = metadata.version(candidate)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def run_measurement(name: str, out: Path, seconds: float) -> dict[str, Any]:
    """One measurement in its own process; its ledger, also when it crashed or was cut off."""
    path = out / f"{name}.json"
    path.unlink(missing_ok=True)
    script = HERE / f"measure_{name}.py"
    if not script.exists():
        return {"piece": name, "state": "absent", "entries": {}, "problems": {"script": f"{script.name} is not there"}}
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(script), "--out", str(out), "--seconds", f"{seconds:.0f}"]
    print(f"[run_all] {name}: {MEASUREMENTS[name]} ({seconds:.0f} s)", flush=True)
    try:
        # A quarter minute of grace: the measurement stops by itself, this is for one that hangs.
        status = subprocess.run(command, env=environment, cwd=ROOT, timeout=seconds + 15, check=False).returncode
    except subprocess.TimeoutExpired:
        status = 124
    empty = {"piece": name, "entries": {}, "problems": {}}
    result = json.loads(path.read_text()) if path.exists() else empty
    path.unlink(missing_ok=True)
    if status != 0:
        result["state"] = "timeout" if status == 124 else "crashed"
        result["problems"]["process"] = f"exit status {status}"
    result["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return result


def markdown(results: dict[str, Any]) -> str:
    """The same results for people: a table per measurement, tables of rows as tables."""
    lines = ["# GPU results", "", ", ".join(f"{key} {value}" for key, value in results["versions"].items()), ""]
    for name, measurement in results["pieces"].items():
        lines += [
            f"## {name}: {MEASUREMENTS.get(name, '')}",
            "",
            f"{measurement['state']}, {measurement.get('seconds', '-')} s",
            "",
        ]
        for key, value in measurement["entries"].items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                columns = list(value[0])
                lines += [f"### {key}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
                lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in value]
                lines.append("")
            elif isinstance(value, dict):
                lines += [f"### {key}", "", *(f"- {entry}: {found}" for entry, found in value.items()), ""]
            else:
                lines += [f"- {key}: {value}"]
        lines += [f"- **not measured** {key}: {value}" for key, value in measurement["problems"].items()] + [""]
    return "\n".join(lines)


def load(folder: Path | None) -> dict[str, Any]:
    path = folder / "results.json" if folder else None
    return json.loads(path.read_text()) if path and path.exists() else {"pieces": {}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measurements", default=",".join(MEASUREMENTS), help="comma-separated; default: all")
    parser.add_argument("--budget", type=float, default=540, help="seconds for the whole call")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks/results/gpu"))
    parser.add_argument("--resume", type=Path, help="folder with an earlier results.json")
    parser.add_argument("--again", action="store_true", help="run measurements that are already done too")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:10} {question}" for name, question in MEASUREMENTS.items()))
        return 0
    wanted = [name.strip() for name in options.measurements.split(",") if name.strip()]
    unknown = sorted(set(wanted) - set(MEASUREMENTS))
    if unknown:
        parser.error(f"unknown measurement {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")

    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.budget
    results: dict[str, Any] = {"versions": versions(), "pieces": {}}
    results["pieces"] |= load(options.resume)["pieces"] | load(options.out)["pieces"]
    worst = 0
    for position, name in enumerate(wanted):
        done = results["pieces"].get(name, {}).get("state") == "done"
        if done and not options.again:
            print(f"[run_all] {name}: already done", flush=True)
            continue
        share = (end - time.monotonic() - 15) / (len(wanted) - position)
        # Measurements that come late may use what earlier ones left, but never more than ten minutes.
        share = min(max(share, 0), 585)
        if share < 10:
            print(f"[run_all] {name}: no time left in the budget of {options.budget:.0f} s", flush=True)
            worst = max(worst, 2)
            continue
        result = run_measurement(name, options.out, share)
        results["pieces"][name] = result
        worst = max(worst, {"done": 0, "skipped": 0}.get(result.get("state", "crashed"), 1))
        (options.out / "results.json").write_text(json.dumps(results, indent=1, default=str))
        (options.out / "results.md").write_text(markdown(results))
        print(f"[run_all] {name}: {result.get('state')}", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
