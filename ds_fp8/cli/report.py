"""`ds_fp8 report LOG... -o report.html`: what telemetry wrote, as one page that needs no network.

For each log (`telemetry_rank0.jsonl`, one a rank): the plan; the loss and the bytes on the wire; amax, scale and
the share of elements flushed to zero, for each layer and operand over steps; and the alarms. Needs plotly, the extra
`report`. Exit code 0: written; 1: nothing to draw; 2: a file cannot be read, or plotly is missing.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

from ..telemetry import read_jsonl_log
from ..telemetry.tensor_statistics import ROLES
from .history import QUANTITIES, History, read_history

TITLES = {"amax": "largest absolute value", "scale": "scale", "underflow": "share flushed to zero"}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ds_fp8 report</title>
<style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 90em; }}
pre {{ background: #f4f4f4; padding: 1em; overflow-x: auto; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2em .8em; border-bottom: 1px solid #ccc; text-align: left; }}
</style></head><body>
<h1>ds_fp8 report</h1>
{body}
</body></html>
"""


def main(argv: Sequence[str]) -> int:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(prog="ds_fp8 report", description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="+", metavar="LOG", help="JSONL files in the folder telemetry/path")
    parser.add_argument("-o", "--output", default="report.html", help="default: report.html")
    options = parser.parse_args(argv)
    if util.find_spec("plotly") is None:
        return _refuse("draws with plotly, which is not installed: pip install 'ds-fp8[report]'", 2)
    histories = {}
    for name in options.logs:
        try:
            events = read_jsonl_log(name)
            if not events:
                return _refuse(f"{name} is no telemetry log: no line of it is an event", 2)
            histories[name] = read_history(events)
        except (OSError, UnicodeDecodeError, KeyError, TypeError) as error:
            return _refuse(f"{name} is no telemetry log that can be read ({type(error).__name__}: {error})", 2)
        if not histories[name].steps:
            return _refuse(f"{name} holds no step yet; telemetry/interval says how often one is written", 1)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(page(histories), encoding="utf-8")
    steps = sum(len(history.steps) for history in histories.values())
    alarms = sum(len(history.alarms) for history in histories.values())
    print(f"{options.output}: {len(histories)} log(s), {steps} step(s), {alarms} alarm(s)")
    return 0


def _refuse(reason: str, code: int) -> int:
    print(f"ds_fp8 report: {reason}", file=sys.stderr)
    return code


def page(histories: dict[str, History]) -> str:
    """The whole page; plotly's script stands in it once, so that it opens on a cluster without a network."""
    parts: list[str] = []
    script = True
    for name, history in histories.items():
        times = "" if history.runs == 1 else f", started {history.runs} times"
        parts.append(f"<h2>{html.escape(name)}</h2><p>{len(history.steps)} steps{times}</p>")
        parts.append(f"<pre>{html.escape(history.banner)}</pre>")
        for figure in (progress(history), operands(history)):
            parts.append(figure.to_html(full_html=False, include_plotlyjs=script))
            script = False
        parts.append(alarm_table(history))
    return PAGE.format(body="\n".join(parts))


def progress(history: History) -> Any:
    """Loss, where the script used `engine.backward`; and bytes on the wire beside those of DeepSpeed alone."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=("loss", "bytes sent by this rank for each step"))
    lines = [
        (1, "loss", *history.values("loss")),
        (2, "sent", *history.sent_bytes()),
        (2, "DeepSpeed alone", *history.bytes_of_deepspeed()),
    ]
    for column, name, steps, values in lines:
        figure.add_trace(go.Scatter(x=steps, y=values, name=name, mode="lines+markers"), row=1, col=column)
    figure.update_xaxes(title_text="optimizer step")
    figure.update_layout(height=380)
    return figure


def operands(history: History) -> Any:
    """Three rows (amax, scale, underflow) of three operands; a layer has one colour everywhere and one legend entry."""
    import plotly.graph_objects as go
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    titles = [f"{role}: {TITLES[quantity]}" for quantity in QUANTITIES for role in ROLES]
    figure = make_subplots(len(QUANTITIES), len(ROLES), subplot_titles=titles, shared_xaxes=True)
    palette = qualitative.Dark24
    colours = {layer: palette[index % len(palette)] for index, layer in enumerate(history.layers())}
    named: set[str] = set()
    for row, quantity in enumerate(QUANTITIES, start=1):
        for column, role in enumerate(ROLES, start=1):
            for layer, (steps, values) in history.statistics(role, quantity).items():
                line = go.Scatter(
                    x=steps,
                    y=values,
                    name=layer,
                    legendgroup=layer,
                    showlegend=layer not in named,
                    mode="lines+markers",
                    line={"color": colours[layer]},
                )
                named.add(layer)
                figure.add_trace(line, row=row, col=column)
            figure.update_yaxes(type="linear" if quantity == "underflow" else "log", row=row, col=column)
    figure.update_xaxes(title_text="optimizer step", row=len(QUANTITIES))
    figure.update_layout(height=320 * len(QUANTITIES))
    return figure


def alarm_table(history: History) -> str:
    """What telemetry warned of, and which key to change."""
    if not history.alarms:
        return "<p>No alarms.</p>"
    rows = (
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in alarm) + "</tr>" for alarm in history.alarms
    )
    head = "".join(f"<th>{name}</th>" for name in ("step", "kind", "layer", "alarm"))
    return f"<h3>Alarms</h3><table><tr>{head}</tr>{''.join(rows)}</table>"
