"""`ds_fp8 estimate FILE --params N --world-size W`: memory and wire of every level and ZeRO stage, side by side.

For the choice of a level before there is a model to load. With `--model MODULE:FACTORY` instead of `--params` the model
is counted, and the share of its matrix FLOPs that computes in FP8 is told. Without a file it compares the levels for a
bf16 job. Exit code 1 when the file has problems or the plan is refused, 2 when file or model cannot be read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from .. import config
from ..errors import ConfigError, DsFp8Error
from ..levels import Level
from .budget import ROWS, STAGES, Job, is_possible, resident_bytes, sent_bytes
from .tables import print_table

SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def main(argv: Sequence[str]) -> int:
    """Print two tables, or JSON."""
    options = _options(argv)
    try:
        settings = config.load(options.file) if options.file else config.Settings()
    except ConfigError as error:
        print(error)
        return 2 if any(not problem.path for problem in error.problems) else 1
    facts = settings.deepspeed
    base = options.base or (facts.base_dtype if options.file else "bf16")
    share = None
    if options.model is not None:
        try:
            options.params, share = _count(options.model, settings)
        except DsFp8Error as error:
            print(f"{type(error).__name__}: {error}")
            return 1
        except Exception as error:  # noqa: BLE001  # the factory is the user's code: whatever it raises is told
            print(f"--model {options.model}: {type(error).__name__}: {error}")
            return 2
    job = Job(options.params, options.world_size, options.gas or facts.gradient_accumulation_steps or 1, base)
    rows = dict(ROWS)
    level = settings.msamp.level
    if level is not None and level not in rows.values():
        rows[f"{level.name} as in the file"] = level
    if options.json:
        print(json.dumps({**as_json(rows, job), **({"share": share} if share else {})}))
        return 0
    print(f"{job.params:,} parameters, {job.world_size} ranks, {job.base}, {job.gas} micro-batch(es) per step")
    if options.file:
        chosen = level.name if level else "fp8" if settings.fp8.enabled else "AMP"
        print(f"{options.file}: {chosen}, ZeRO {facts.zero_stage}")
    if share:
        print(share)
    stages = [f"ZeRO {stage}" for stage in STAGES]
    print_table(
        "Bytes kept per rank: weights, gradients, masters, states", ["", *stages], _memory(rows, job), numbers=True
    )
    print_table("Bytes sent per rank and step: gradients + weights", ["", *stages], _wire(rows, job), numbers=True)
    print("Activations and buffers come on top. O3: as if FP8 layers owned every weight. '-': not possible.")
    return 0


def _count(name: str, settings: config.Settings) -> tuple[int, str | None]:
    """(parameters of the model, the plan's sentence about FLOPs; None without fp8)."""
    from ..plan import make_plan, share_line
    from .explain import build_model

    model = build_model(name, no_meta=False)
    params = sum(parameter.numel() for parameter in model.parameters())
    return params, share_line(make_plan(model, settings)) if settings.fp8.enabled else None


def as_json(rows: dict[str, Level], job: Job) -> dict[str, Any]:
    """The same figures as plain numbers; null where a level is not possible."""
    table: dict[str, Any] = {}
    for name, level in rows.items():
        table[name] = [
            {
                "stage": stage,
                "resident_bytes": round(resident_bytes(level, stage, job)),
                "sent_gradient_bytes": round(sent_bytes(level, stage, job)[0]),
                "sent_weight_bytes": round(sent_bytes(level, stage, job)[1]),
            }
            if is_possible(level, stage)
            else None
            for stage in STAGES
        ]
    return {"params": job.params, "world_size": job.world_size, "gas": job.gas, "base": job.base, "levels": table}


def _memory(rows: dict[str, Level], job: Job) -> list[list[str]]:
    return [
        [
            name,
            *(_cell(resident_bytes(level, stage, job), job) if is_possible(level, stage) else "-" for stage in STAGES),
        ]
        for name, level in rows.items()
    ]


def _wire(rows: dict[str, Level], job: Job) -> list[list[str]]:
    table = []
    for name, level in rows.items():
        cells = []
        for stage in STAGES:
            gradient, weight = sent_bytes(level, stage, job)
            cells.append(f"{human(gradient)} + {human(weight)}" if is_possible(level, stage) else "-")
        table.append([name, *cells])
    return table


def _cell(size: float, job: Job) -> str:
    return f"{human(size)} ({size / job.params:.2f} B/param)"


def human(size: float) -> str:
    """1536 -> '1.50 KiB'."""
    unit = "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024:
            break
        size, unit = size / 1024, bigger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def count(text: str) -> int:
    """A number of parameters as people write it: 7e9, 7B, 350M."""
    factor = SUFFIXES.get(text[-1:].lower(), 1)
    try:
        number = float(text[:-1] if factor != 1 else text) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters; write 7e9, 7B or 350M") from None
    if not number >= 1 or number == float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1 parameter is needed")
    return round(number)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ds_fp8 estimate", description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", metavar="FILE", help="DeepSpeed configuration; without it, bf16 is assumed")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--params", type=count, metavar="N", help="parameters of the model: 7e9, 7B, 350M")
    size.add_argument("--model", metavar="MODULE:FACTORY", help="callable that returns the model, e.g. train:build")
    parser.add_argument("--world-size", type=_positive, required=True, metavar="W", help="data-parallel ranks")
    parser.add_argument("--gas", type=_positive, help="micro-batches per optimizer step (default: the file's, else 1)")
    parser.add_argument("--base", choices=("bf16", "fp16", "fp32"), help="dtype of the weights (default: the file's)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)
