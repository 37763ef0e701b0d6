"""FP8 on the wire: how exact, how many bytes, how fast, beside what DeepSpeed sends today.

    python benchmarks/bench_wire.py                all parts in full: about ten minutes on two quiet cores, as root
    python benchmarks/bench_wire.py --small        a minute or two per part, to see that everything runs
    python benchmarks/bench_wire.py --part time    one of error, bytes, time

Results: JSON lines on stdout and `results/wire_<hardware>_<month>.{json,md}`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from typing import Any

from harness import RESULTS, cpu_name, goal_row, goal_table, hardware_slug, versions
from wire_error import measure as measure_error
from wire_ranks import in_namespace

FP32 = "deepspeed fp32"
RATES = {"bare loopback": None, "4 Gbit/s": "4gbit", "1 Gbit/s": "1gbit"}


def error_part(small: bool) -> dict[str, Any]:
    rows = measure_error(1 << 14 if small else 1 << 20, (2, 4) if small else (2, 4, 8), ["e4m3", "e5m2"])
    e4m3 = [row for row in rows if row["wire"] == "e4m3"]
    goals = [
        goal("stage 0, W = 2: error", max(r["stage0"] for r in e4m3 if r["world_size"] == 2), 0.04, "<="),
        goal("ZeRO half, W = 2: error", max(r["zero_half"] for r in e4m3 if r["world_size"] == 2), 0.025, "<="),
        goal("ZeRO half, every W: error", max(r["zero_half"] for r in e4m3), 0.025, "<="),
        goal("SNR, least of all rows, dB", min(snr(r["stage0"]) for r in e4m3), 28, ">="),
        goal(
            "SNR of stage 0 on lognormal s = 2, dB",
            min(snr(r["stage0"]) for r in e4m3 if r["distribution"] == "lognormal"),
            38,
            ">=",
        ),
    ]
    return {"rows": rows, "goals": goals}


def bytes_part(small: bool) -> dict[str, Any]:
    rows = []
    for world_size, gas in [(2, 1)] if small else [(2, 1), (2, 4), (4, 1)]:
        rows += in_namespace("wire_bytes.py", [str(world_size), str(gas), "5"], rate=None)
    sent = {
        (r["stage"], r["kind"]): r["bytes_per_parameter_rank_step"]
        for r in rows
        if (r["world_size"], r["gas"]) == (2, 1)
    }

    def share(what: str, ratio: float, wanted: float, peer: tuple[int, str]) -> dict[str, Any]:
        reason = "headers and acknowledgements of TCP are counted too"
        return goal(what, ratio, wanted, "<=", peer=f"{peer[1]} {sent[peer]:.3f} bytes", reason=reason)

    goals = [
        share("stage 0, O2 / DeepSpeed fp32", sent[0, "O2"] / sent[0, FP32], 0.26, (0, FP32)),
        # The 16-bit gather of the weights is the same on both sides of the gradient's comparison.
        share("ZeRO-2 gradients, O2 / DeepSpeed bf16", gradients(sent, 2), 0.26, (2, "deepspeed bf16")),
    ]
    for stage in (1, 2):
        what = f"ZeRO-{stage} whole step, O3 / fp32 gradients + bf16 weights"
        goals.append(share(what, sent[stage, "O3"] / sent[stage, FP32], 0.35, (stage, FP32)))
    return {"rows": rows, "goals": goals}


def gradients(sent: dict[Any, float], stage: int, world_size: int = 2) -> float:
    """Ratio of the gradients' bytes alone: without the gather of 16-bit weights, 2 (W - 1) / W per parameter."""
    weights = 2 * (world_size - 1) / world_size
    return (sent[stage, "O2"] - weights) / (sent[stage, "deepspeed bf16"] - weights)


def time_part(small: bool) -> dict[str, Any]:
    numel, repeats = (1 << 23, 5) if small else (25_000_000, 9)
    rows, goals = [], []
    for network, rate in RATES.items():
        taken = in_namespace("wire_time.py", [str(numel), str(repeats), "0"], rate=rate)
        fp32 = taken["fp32 all-reduce"]["median_s"]
        for contestant, seconds in taken.items():
            rows.append({"network": network, "contestant": contestant, **seconds, "faster": fp32 / seconds["median_s"]})
        ours = fp32 / taken["fp8 all-reduce, fp32 gradients"]["median_s"]
        wanted = {"bare loopback": 1.7, "1 Gbit/s": 3.9}.get(network)
        if wanted:
            peer = f"fp32 all-reduce {fp32 * 1e3:.0f} ms"
            reason = (
                f"{numel / 1e6:.0f}M elements; bf16's all-reduce {taken['bf16 all-reduce']['median_s'] * 1e3:.0f} ms"
            )
            what = f"{network}: fp8 against fp32 all-reduce"
            goals.append(goal(what, ours, wanted, ">=", unit="x", peer=peer, reason=reason))
    return {"rows": rows, "goals": goals}


def snr(error: float) -> float:
    return -20 * math.log10(error) if error else math.inf


def goal(
    what: str, result: float, wanted: float, sign: str, unit: str = "", peer: str = "", reason: str = ""
) -> dict[str, Any]:
    return goal_row("wire", what, result, wanted, unit=unit, peer=peer, reason=reason, at_most=sign == "<=")


def markdown(parts: dict[str, Any], command: str) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = ["# FP8 on the wire", "", f"{now:%Y-%m-%d}, {cpu_name()}; {software}  ", f"`{command}`", ""]
    lines += goal_table([row for part in parts.values() for row in part["goals"]])
    if "error" in parts:
        lines += ["", "## Relative L2 error of the mean gradient", ""]
        lines += [
            "| W | gradients | correlation | wire | ZeRO half | stage 0 | SNR dB |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in parts["error"]["rows"]:
            ranks = f"{r['world_size']}{' (simulated)' if r.get('simulated') else ''}"
            lines.append(
                f"| {ranks} | {r['distribution']} | {r['correlation']} | {r['wire']} | {r['zero_half']:.4f}"
                f" | {r['stage0']:.4f} | {snr(r['stage0']):.1f} |"
            )
    if "bytes" in parts:
        lines += ["", "## Bytes per parameter, rank and optimizer step, counted by the kernel", ""]
        lines += [
            "| W | stage | gas | what | bytes | by our counters: gradient, weight, scale |",
            "|---|---|---|---|---|---|",
        ]
        for r in parts["bytes"]["rows"]:
            counted = ", ".join(f"{r['counted'][kind]:.3f}" for kind in ("gradient", "weight", "scale"))
            lines.append(
                f"| {r['world_size']} | {r['stage']} | {r['gas']} | {r['kind']}"
                f" | {r['bytes_per_parameter_rank_step']:.3f} | {counted} |"
            )
    if "time" in parts:
        lines += ["", "## Time of one exchange, two ranks", ""]
        lines += ["| network | contestant | median ms | least | most | CPU ms a rank | x fp32 |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for r in parts["time"]["rows"]:
            times = " | ".join(f"{r[name] * 1e3:.1f}" for name in ("median_s", "least_s", "most_s", "cpu_s"))
            lines.append(f"| {r['network']} | {r['contestant']} | {times} | {r['faster']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("error", "bytes", "time"), action="append", help="default: all three")
    parser.add_argument("--small", action="store_true", help="small sizes; the results are not written")
    arguments = parser.parse_args()
    measures = {"error": error_part, "bytes": bytes_part, "time": time_part}
    parts = {}
    for name in arguments.part or measures:
        parts[name] = measures[name](arguments.small)
        for row in (*parts[name]["rows"], *parts[name]["goals"]):
            print(json.dumps({"bench": "wire", "part": name, **row}), flush=True)
    text = markdown(parts, " ".join(["python benchmarks/bench_wire.py", *sys.argv[1:]]))
    if arguments.small:
        print(text)
        return
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"wire_{hardware_slug()}_{datetime.datetime.now(datetime.timezone.utc):%Y%m}"
    stem.with_suffix(".json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
