"""Two or more runs of train_gpt.py side by side: a table on the terminal, and their loss curves as a PNG.

    python examples/compare.py runs/main_job/bf16 runs/main_job/fp8 --plot runs/main_job/loss.png

Reads metrics.json of each run and, where the plugin wrote one, telemetry.jsonl: the plan that was in effect.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def read(run: Path) -> dict:
    """Metrics of one run, with the plan that ds_fp8 reported for it (empty without the plugin)."""
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["name"] = run.name
    metrics["telemetry"] = {}
    log = run / "telemetry.jsonl"
    if log.exists():
        for line in log.read_text().splitlines():
            event = json.loads(line)
            metrics["telemetry"][event["event"]] = event
    return metrics


def rows(runs: list[dict]) -> list[list[str]]:
    """The table, one column for each run."""
    first = runs[0]

    def row(title: str, cell) -> list[str]:
        return [title, *(cell(run) for run in runs)]

    def told(run: dict, key: str, otherwise: str) -> str:
        return run["telemetry"].get("plan", {}).get(key, otherwise)

    return [
        row("configuration", lambda run: Path(run["config"]).name),
        row("eval loss", lambda run: f"{run['eval_loss']:.4f}"),
        row("  beside the first", lambda run: f"{run['eval_loss'] - first['eval_loss']:+.4f}"),
        row("steps/s", lambda run: f"{run['steps_per_s']:.2f}"),
        row("tokens/s", lambda run: f"{run['tokens_per_s']:.0f}"),
        row("layers in FP8", lambda run: told(run, "converted", "none")),
        row("bytes per rank", lambda run: told(run, "bytes", "as DeepSpeed")),
        row("wire per step", lambda run: told(run, "wire", "as DeepSpeed")),
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
