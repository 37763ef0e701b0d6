"""Two or more runs of train_gpt.py side by side: a table on the terminal, and their loss curves as a PNG.

    python examples/compare.py runs/main_job/bf16 runs/main_job/fp8 --plot runs/main_job/loss.png

Reads metrics.json of each run and, where its JSON asked for telemetry, the plan that ds_fp8 wrote into its log.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import hjson

from ds_fp8.plan import Estimate, Fp8Plan, Plan, estimate
from ds_fp8.telemetry import read_jsonl_log


def read(run: Path) -> dict:
    """Metrics of one run, with the plan that was in effect (None without the plugin)."""
    metrics = json.loads((run / "metrics.json").read_text())
    config = hjson.loads(Path(metrics["config"]).read_text())
    folder = config.get("fp8", {}).get("telemetry", {}).get("path")
    log = Path(folder or run) / "telemetry_rank0.jsonl"
    plans = [event["plan"] for event in read_jsonl_log(log) if event["event"] == "plan"] if log.exists() else []
    return {**metrics, "name": run.name, "plan": Plan.from_json(json.dumps(plans[-1])) if plans else None}


def converted(plan: Plan | None) -> str:
    """`17 of 17 Linear, 9 of 9 LayerNorm`."""
    if plan is None:
        return "none"
    seen, swapped = (Counter(module.kind for module in modules) for modules in (plan.modules, plan.swaps))
    return ", ".join(f"{swapped[kind]} of {seen[kind]} {kind}" for kind in seen)


def cost(plan: Plan | None, model: Plan | None) -> Estimate | None:
    """Bytes of a run; those of one without the plugin are counted on the same model with every section off."""
    if plan is None:
        plan = None if model is None else replace(model, fp8=Fp8Plan(), optim=None, comm=None)
    return None if plan is None else estimate(plan)


def rows(runs: list[dict]) -> list[list[str]]:
    """The table, one column for each run."""
    first = runs[0]
    model = next((run["plan"] for run in runs if run["plan"]), None)
    costs = [cost(run["plan"], model) for run in runs]

    def row(title: str, cell) -> list[str]:
        return [title, *(cell(run) for run in runs)]

    def megabytes(title: str, value) -> list[str]:
        return [title, *(f"{value(each) / 1e6:.1f} MB" if each else "-" for each in costs)]

    return [
        row("", lambda run: Path(run["config"]).name),
        row("eval loss", lambda run: f"{run['eval_loss']:.4f}"),
        row("  against the first", lambda run: f"{run['eval_loss'] - first['eval_loss']:+.4f}"),
        row("layers in FP8", lambda run: converted(run["plan"])),
        row("steps/s", lambda run: f"{run['steps_per_s']:.2f}"),
        row("tokens/s", lambda run: f"{run['tokens_per_s']:.0f}"),
        megabytes("model and optimizer, per rank", lambda each: each.resident_bytes),
        megabytes("gradients sent per step", lambda each: each.gradient_wire_bytes),
        megabytes("weights sent per step", lambda each: each.weight_wire_bytes),
    ]


def print_table(table: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for number, row in enumerate(table):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def plot(runs: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for number, run in enumerate(runs):
        colour = f"C{number}"
        axes.plot(*zip(*run["curve"]["train"]), color=colour, alpha=0.35, linewidth=0.9)
        axes.plot(*zip(*run["curve"]["eval"]), color=colour, marker="o", markersize=4, label=f"{run['name']} (eval)")
    axes.set(xlabel="step", ylabel="cross entropy, nats per byte", title="The same script, two JSON files")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    print(f"curves: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="--out folders of train_gpt.py; the first is the reference")
    parser.add_argument("--plot", type=Path, help="PNG to draw the curves into")
    args = parser.parse_args()
    runs = [read(run) for run in args.runs]
    print_table(rows(runs))
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
