"""The page of `measure_parity.py`'s results: `parity_report.py OUT.md RESULTS.json ...`; curves go to OUT.svg beside
it.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Runs = dict[str, dict[int, dict[str, Any]]]
"""Configuration -> seed -> what the run found."""

COLOURS = ("#222222", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#e377c2", "#8c564b", "#7f7f7f")
WIDTH, HEIGHT, LEFT, TOP = 760, 300, 60, 24


def read(paths: list[Path]) -> tuple[dict[str, Runs], dict[str, Any], list[dict[str, Any]]]:
    """Kind -> configuration -> seed -> finished run; runs that were cut off; the machine and the corpus of each
    file.
    """
    kinds: dict[str, Runs] = defaultdict(lambda: defaultdict(dict))
    cut: dict[str, Any] = {}
    facts = []
    for path in paths:
        found = json.loads(path.read_text())
        facts.append({"machine": found.pop("machine", {}), "corpus": found.pop("corpus", {})})
        for name, run in found.items():
            if run["state"] == "done":
                kind, configuration, seed = name.split("/")
                kinds[kind][configuration][int(seed)] = run
            elif len(run["evals"]) > 1:
                cut[name] = run
    last = max((run["evals"][-1][0] for run in kinds["pretrain"]["bf16"].values()), default=-1)
    for name, run in cut.items():
        kind, configuration, seed = name.split("/")
        if kind == "pretrain" and run["evals"][-1][0] == last:  # cut off after its last evaluation
            kinds[kind][configuration].setdefault(int(seed), run)
    done = {f"{kind}/{name}/{seed}" for kind, runs in kinds.items() for name, seeds in runs.items() for seed in seeds}
    return kinds, {name: run for name, run in cut.items() if name not in done}, facts


def cut_off(cut: dict[str, Any], kinds: dict[str, Runs]) -> list[str]:
    """Gaps at the last evaluations of runs that the end of a piece has cut off."""
    lines = []
    for name, run in cut.items():
        kind, configuration, seed = name.split("/")
        base = kinds[kind]["bf16"].get(int(seed))
        if base is not None:
            known = dict(map(tuple, base["evals"]))  # type: ignore[arg-type]
            shown = ", ".join(
                f"{loss - known[step]:+.4f} at {step}" for step, loss in run["evals"][-3:] if step in known
            )
            lines.append(
                f"- {kind} of {configuration}, seed {seed}, {run['ranks']} rank(s), cut off by the end of its piece: "
                f"{shown}"
            )
    return ["", "Gaps to bf16 of the same seed, by step:", "", *lines] if lines else []


def final(run: dict[str, Any]) -> float:
    return run["evals"][-1][1]


def signed(values: list[float]) -> str:
    return ", ".join(f"{value:+.4f}" for value in values) or "-"


def mean_of(values: list[float]) -> str:
    return f"{statistics.mean(values):+.4f}" if values else "-"


def gaps(runs: Runs, configuration: str, value: Any = final) -> list[float]:
    """That of each seed to bf16 of the same seed."""
    mine, base = runs[configuration], runs["bf16"]
    return [value(mine[seed]) - value(base[seed]) for seed in sorted(mine) if seed in base]


def late_loss(run: dict[str, Any]) -> float:
    return statistics.mean(run["losses"][-100:])


def moved(run: dict[str, Any], base: dict[str, Any]) -> str:
    """How far masters went in the tail, beside bf16's: least and largest ratio over the weights that were looked at."""
    moves = run.get("moved in the tail", {})
    ratios = [value / base["moved in the tail"][name] for name, value in moves.items()]
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-"


def rise(run: dict[str, Any]) -> float:
    """Largest rise of the evaluation between two neighbours."""
    losses = [loss for _, loss in run["evals"]]
    return max(later - earlier for earlier, later in itertools.pairwise(losses))


def pretraining(runs: Runs) -> list[str]:
    lines = [
        (
            "| configuration | ranks | eval loss by seed | gap to bf16 by seed | mean | training loss, last 100 steps "
            "| forward in FP8 | "
        )
    ]
    lines[0] += "moved at lr 1e-6, of bf16's | largest rise between evaluations | tokens/s |"
    lines.append("|---" * 10 + "|")
    for name, seeds in runs.items():
        each = [seeds[seed] for seed in sorted(seeds)]
        shown = ", ".join(f"{final(run):.4f}" for run in each)
        own, late = gaps(runs, name), gaps(runs, name, late_loss)
        whole = [run for run in each if "eval as in training" in run and name != "bf16"]
        in_fp8 = [run["eval as in training"] - final(run) for run in whole]
        tail = [moved(run, runs["bf16"][seed]) for seed, run in sorted(seeds.items()) if seed in runs["bf16"]]
        cells = [name, str(each[0]["ranks"]), shown]
        cells += ["-", "-", "-"] if name == "bf16" else [signed(own), mean_of(own), mean_of(late)]
        cells += [mean_of(in_fp8), tail[0] if tail else "-", f"{max(map(rise, each)):+.4f}"]
        speeds = [run["tokens per s"] for run in each if "tokens per s" in run]
        cells.append(f"{statistics.median(speeds):,.0f}" if speeds else "-")
        lines.append(f"| {' | '.join(cells)} |")
    losses = [final(run) for run in runs["bf16"].values()]
    if len(losses) > 1:
        spread, width = statistics.stdev(losses), max(losses) - min(losses)
        lines += ["", f"bf16 over its own seeds: standard deviation {spread:.4f}, largest less smallest {width:.4f}."]
    if "bf16 again" in runs:
        lines.append(
            f"bf16 run once more with the same seed, by seed: {signed(gaps(runs, 'bf16 again'))} in the evaluation, "
            f"{signed(gaps(runs, 'bf16 again', late_loss))} in the training loss: CUDA's sums have no fixed order."
        )
    return lines


def adapting(kind: str, runs: Runs) -> list[str]:
    title = {"tune": "all weights", "lora": "LoRA, rank 16 on every linear layer"}[kind]
    lines = [
        "",
        f"Fine-tuning, {title}:",
        "",
        "| configuration | before | after, by seed | gap to bf16 by seed |",
        "|---|---|---|---|",
    ]
    for name, seeds in runs.items():
        each = [seeds[seed] for seed in sorted(seeds)]
        before = f"{each[0]['evals'][0][1]:.4f}"
        shown = ", ".join(f"{final(run):.4f}" for run in each)
        lines.append(f"| {name} | {before} | {shown} | {'-' if name == 'bf16' else signed(gaps(runs, name))} |")
    return lines


def operands(runs: Runs) -> list[str]:
    """Underflow and clamping of each role, and the layers that are worst."""
    lines = ["", "Operands of all layers over the looks of telemetry (each tenth of a run), first seed:", ""]
    lines += [
        (
            "| configuration | role | mean share flushed to zero | largest, and where | layers clamped at a look | "
            "largest `used` |"
        )
    ]
    lines.append("|---" * 6 + "|")
    for name, seeds in runs.items():
        found = next((run["operands"] for _, run in sorted(seeds.items()) if "operands" in run), {})
        for role in ("input", "weight", "grad_output"):
            rows = {layer.rpartition(":")[0]: row for layer, row in found.items() if layer.endswith(f":{role}")}
            if not rows:
                continue
            worst = max(rows, key=lambda layer: rows[layer][1])
            mean = statistics.mean(row[0] for row in rows.values())
            clamped = sum(row[2] > 0 for row in rows.values())
            largest = f"{rows[worst][1]:.2%} {worst}" if rows[worst][1] else "0"
            used = max(row[3] for row in rows.values())
            lines.append(f"| {name} | {role} | {mean:.3%} | {largest} | {clamped} of {len(rows)} | {used:.3g} |")
    return lines


def layers(name: str, seeds: dict[int, dict[str, Any]]) -> list[str]:
    """Block by block: mean underflow of inputs and of gradients, and what was clamped."""
    kinds = ("qkv", "out", "up", "down")
    found = next((run["operands"] for _, run in sorted(seeds.items()) if run.get("operands")), {})
    lines = [
        "",
        f"Layer by layer, {name}: mean share flushed to zero of the input / of the gradient; a star stands for ",
    ]
    lines[-1] += "each operand that was beyond its scale's range (clamped) at one of the looks at least:"
    lines += ["", "| block | " + " | ".join(kinds) + " |", "|---" * 5 + "|"]
    for block in range(1 + max(int(layer.split(".")[1]) for layer in found)):
        cells = []
        for kind in kinds:
            row = {role: found[f"blocks.{block}.{kind}:{role}"] for role in ("input", "weight", "grad_output")}
            stars = "*" * sum(operand[2] > 0 for operand in row.values())
            cells.append(f"{row['input'][0]:.3%} / {row['grad_output'][0]:.3%}{stars}")
        lines.append(f"| {block} | {' | '.join(cells)} |")
    return lines


def curves(runs: Runs) -> str:
    """SVG: the gap of every configuration's evaluation to bf16 of the same seed, by step; seeds as separate lines."""
    lines = []
    for colour, name in zip(COLOURS[1:] * 3, [name for name in runs if name != "bf16"]):
        for seed, run in runs[name].items():
            if seed in runs["bf16"]:
                base = dict(map(tuple, runs["bf16"][seed]["evals"]))  # type: ignore[arg-type]
                points = [(step, loss - base[step]) for step, loss in run["evals"] if step in base]
                lines.append((name, colour, points))
    own = [dict(map(tuple, run["evals"])) for run in runs["bf16"].values()]  # type: ignore[arg-type]
    for other in own[1:]:
        points = [(step, loss - own[0][step]) for step, loss in sorted(other.items()) if step in own[0]]
        lines.append(("bf16, another seed", COLOURS[0], points))
    if not lines:
        return ""
    steps = max(step for *_, points in lines for step, _ in points)
    top = max(abs(gap) for *_, points in lines for _, gap in points) * 1.1 or 1.0

    def at(step: float, gap: float) -> str:
        return f"{LEFT + step / steps * WIDTH:.1f},{TOP + (1 - gap / top) / 2 * HEIGHT:.1f}"

    drawn = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 190} {TOP + HEIGHT + 40}" '
            'font-family="sans-serif" font-size="12">'
        )
    ]
    drawn.append(
        f'<rect width="100%" height="100%" fill="white"/><text x="{LEFT}" y="14">eval loss less that of bf16, same '
        "seed</text>"
    )
    for gap in (-top, -top / 2, 0, top / 2, top):
        x, y = at(0, gap).split(",")
        drawn.append(
            f'<line x1="{x}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}" stroke="#ddd"/><text x="4" y="{y}">{gap:+.4f}</text>'
        )
    for step in range(0, steps + 1, max(steps // 5, 1)):
        drawn.append(f'<text x="{at(step, 0).split(",")[0]}" y="{TOP + HEIGHT + 18}">{step}</text>')
    named: dict[str, str] = {}
    for name, colour, points in lines:
        dashes = ' stroke-dasharray="5 4"' if name.startswith("bf16") else ""
        path = " ".join(at(*point) for point in points)
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5"{dashes} points="{path}"/>')
        named[name] = colour
    for row, (name, colour) in enumerate(named.items()):
        drawn.append(f'<text x="{LEFT + WIDTH + 8}" y="{TOP + 16 * row + 10}" fill="{colour}">{name}</text>')
    return "\n".join([*drawn, "</svg>", ""])


def main(out: Path, paths: list[Path]) -> None:
    kinds, cut, facts = read(paths)
    runs = kinds["pretrain"]
    each = next(iter(runs["bf16"].values()))
    lines = ["# Parity at GPT-2's size: does the evaluation end where bf16's does?", ""]
    lines += ["`benchmarks/gpu/measure_parity.py`, page by `parity_report.py`.", ""]
    for fact in facts:
        machine, corpus = fact["machine"], fact["corpus"]
        lines.append(f"- {machine}; corpus {corpus}")
    lines += [
        "",
        (
            f"{each['parameters'] / 1e6:.0f}M parameters, {len(each['losses'])} optimizer steps, the last ones at a "
            "learning rate of 1e-6."
        ),
        "",
    ]
    lines += pretraining(runs)
    picture = curves(runs)
    if picture:
        out.with_suffix(".svg").write_text(picture)
        lines += ["", f"![Gaps by step]({out.with_suffix('.svg').name})"]
    for kind in ("tune", "lora"):
        if kinds[kind].get("bf16"):
            lines += adapting(kind, kinds[kind])
    lines += cut_off(cut, kinds)
    lines += operands(runs)
    if "delayed" in runs:
        lines += layers("delayed", runs["delayed"])
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
