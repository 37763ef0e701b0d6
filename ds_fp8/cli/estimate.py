"""`ds_fp8 estimate FILE --params N --world-size W`: memory and wire of every level and ZeRO stage, side by side.

It helps to choose a level before there is a model to load. With `--model MODULE:FACTORY` instead of `--params` the
model is counted, and the share of its matrix FLOPs that computes in FP8 is printed. Without a file it compares the
levels for a bf16 job. Exit code 1 when the file has problems or the plan is refused, 2 when file or model cannot be
read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import config
from ..algorithms import moments_of
from ..cost.memory import Bytes, Kept, Placement, bucket_bytes, bytes_of
from ..cost.wire import gradient_bytes, weight_bytes
from ..errors import ConfigError, DsFp8Error
from ..levels import LEVELS, Level
from .tables import print_table

STAGES = (0, 1, 2, 3)

DEEPSPEED = Level("DeepSpeed", exp_avg="fp32", exp_avg_sq="fp32", master="fp32", gradient_wire="none")
"""DeepSpeed's mixed precision: fp32 states and master."""

ROWS = {"AMP": DEEPSPEED, "fp8": DEEPSPEED, **LEVELS}
"""`fp8` alone changes neither states nor communication, but its layers may keep FP8 data of their weights."""

SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Job:
    """A number of parameters, and where they lie."""

    params: int
    where: Placement
    reduce_bucket: float = 5e8

    def at(self, stage: int, row: str) -> Placement:
        """The same job in another ZeRO stage; only rows with FP8 layers keep FP8 data of weights."""
        cached = 0 if row == "AMP" else self.where.cached_weight
        return replace(self.where, zero_stage=stage, cached_weight=cached)


def is_possible(level: Level, stage: int) -> bool:
    """FP8 weights need ZeRO."""
    return level.weight_wire == "none" or stage > 0


def kept_bytes(row: str, level: Level, stage: int, job: Job) -> tuple[Bytes, Bytes]:
    """(device, host) bytes of one rank."""
    ours = level.name != DEEPSPEED.name
    kept = Kept(level.exp_avg, level.exp_avg_sq, level.master, ours, level.weight_wire != "none")
    device, host = bytes_of(kept, job.at(stage, row))
    return device.times(job.params), host.times(job.params)


def sent_bytes(row: str, level: Level, stage: int, job: Job) -> tuple[float, float]:
    """(gradient bytes, weight bytes) that one rank sends per optimizer step."""
    where = job.at(stage, row)
    gradients, weights = gradient_bytes(level.gradient_wire, where), weight_bytes(level.weight_wire, where)
    return job.params * gradients, job.params * weights


def main(argv: Sequence[str]) -> int:
    """Print two tables, or JSON."""
    options = _options(argv)
    try:
        settings = config.load(options.file) if options.file else config.Settings()
    except ConfigError as error:
        print(error)
        return 2 if any(not problem.path for problem in error.problems) else 1
    facts = settings.deepspeed
    share = None
    if options.model is not None:
        try:
            options.params, share = _count(options.model, settings)
        except DsFp8Error as error:
            print(f"{type(error).__name__}: {error}")
            return 1
        except Exception as error:  # noqa: BLE001  # the factory is the user's code: whatever it raises is reported
            print(f"--model {options.model}: {type(error).__name__}: {error}")
            return 2
    job = _job(options, settings)
    moments = moments_of(facts.optimizer)
    rows = {name: level.keeping(moments) for name, level in ROWS.items()}
    level = settings.msamp.level
    if level is not None and level not in rows.values():
        rows[f"{level.name} as in the file"] = level
    if options.json:
        print(json.dumps({**as_json(rows, job), **({"share": share} if share else {})}))
        return 0
    where = job.where
    print(
        f"{job.params:,} parameters, {where.world_size} ranks, {where.base}, {where.micro_batches} micro-batch(es) per step"
    )
    if options.file:
        chosen = level.name if level else "fp8" if settings.fp8.enabled else "AMP"
        offloaded = [name for name in ("optimizer", "param") if getattr(where, f"offload_{name}")]
        print(
            f"{options.file}: {chosen}, ZeRO {facts.zero_stage}" + "".join(f", {name} offloaded" for name in offloaded)
        )
    if share:
        print(share)
    stages = [f"ZeRO {stage}" for stage in STAGES]
    title = "Bytes kept per rank on the device: weights, gradients, masters, states"
    print_table(title, ["", *stages], _memory(rows, job), numbers=True)
    if where.offload_optimizer or where.offload_param:
        print_table("Bytes kept per rank on the host", ["", *stages], _memory(rows, job, host=True), numbers=True)
    print_table("Bytes sent per rank and step: gradients + weights", ["", *stages], _wire(rows, job), numbers=True)
    if options.bandwidth:
        title = f"Seconds of that exchange at {options.bandwidth:g} Gbit/s per rank, nothing hidden"
        print_table(title, ["", *stages], _seconds(rows, job, options.bandwidth), numbers=True)
    bucket = human(bucket_bytes(replace(where, zero_stage=3), job.reduce_bucket, job.params))
    print(
        f"Activations and buffers come on top; in ZeRO 3 DeepSpeed's reduction bucket too ({bucket}). "
        "O3: as if FP8 layers owned every weight. '-': not possible."
    )
    return 0


def _job(options: argparse.Namespace, settings: config.Settings) -> Job:
    facts = settings.deepspeed
    zero = facts.raw.get("zero_optimization")
    bucket = zero.get("reduce_bucket_size") if isinstance(zero, dict) else None
    where = Placement(
        facts.zero_stage,
        options.world_size,
        options.base or (facts.base_dtype if options.file else "bf16"),
        options.gas or facts.gradient_accumulation_steps or 1,
        facts.offload_optimizer is not None,
        facts.offload_param is not None,
        2 if settings.fp8.weight_cache else 0,
    )
    return Job(options.params, where, bucket if isinstance(bucket, (int, float)) else 5e8)


def _count(name: str, settings: config.Settings) -> tuple[int, str | None]:
    """(parameters of the model, the plan's sentence about FLOPs; None without fp8)."""
    from ..plan import make_plan, share_line
    from .explain import build_model

    model = build_model(name, no_meta=False)
    params = sum(parameter.numel() for parameter in model.parameters())
    return params, share_line(make_plan(model, settings)) if settings.fp8.enabled else None


def as_json(rows: dict[str, Level], job: Job) -> dict[str, Any]:
    """The same figures as numbers; null where a level is not possible."""
    table: dict[str, Any] = {}
    for name, level in rows.items():
        table[name] = []
        for stage in STAGES:
            device, host = kept_bytes(name, level, stage, job)
            gradients, weights = sent_bytes(name, level, stage, job)
            entry = {
                "stage": stage,
                "resident_bytes": round(device.total),
                "host_bytes": round(host.total),
                **{f"{part}_bytes": round(size) for part, size in asdict(device).items()},
                "sent_gradient_bytes": round(gradients),
                "sent_weight_bytes": round(weights),
            }
            table[name].append(entry if is_possible(level, stage) else None)
    where = job.where
    facts = {"params": job.params, "world_size": where.world_size, "gas": where.micro_batches, "base": where.base}
    return {**facts, "levels": table}


def _rows(rows: dict[str, Level], cell: Callable[[str, Level, int], str]) -> list[list[str]]:
    return [
        [name, *(cell(name, level, stage) if is_possible(level, stage) else "-" for stage in STAGES)]
        for name, level in rows.items()
    ]


def _memory(rows: dict[str, Level], job: Job, *, host: bool = False) -> list[list[str]]:
    def cell(name: str, level: Level, stage: int) -> str:
        size = kept_bytes(name, level, stage, job)[host].total
        return f"{human(size)} ({size / job.params:.2f} B/param)"

    return _rows(rows, cell)


def _wire(rows: dict[str, Level], job: Job) -> list[list[str]]:
    return _rows(rows, lambda name, level, stage: " + ".join(map(human, sent_bytes(name, level, stage, job))))


def _seconds(rows: dict[str, Level], job: Job, gigabits: float) -> list[list[str]]:
    return _rows(
        rows, lambda name, level, stage: f"{sum(sent_bytes(name, level, stage, job)) * 8 / gigabits / 1e9:.3g}"
    )


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


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no bandwidth in Gbit/s, e.g. 100")
    return number


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ds_fp8 estimate", description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", metavar="FILE", help="DeepSpeed configuration; without it, bf16 is assumed")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--params", type=count, metavar="N", help="parameters of the model: 7e9, 7B, 350M")
    size.add_argument("--model", metavar="MODULE:FACTORY", help="callable that returns the model, e.g. train:build")
    parser.add_argument("--world-size", type=_positive, required=True, metavar="W", help="data-parallel ranks")
    parser.add_argument("--gas", type=_positive, help="micro-batches per optimizer step (default: the file's, else 1)")
    parser.add_argument("--base", choices=("bf16", "fp16", "fp32"), help="dtype of the weights (default: the file's)")
    parser.add_argument("--bandwidth", type=_above_zero, metavar="GBIT", help="of the network per rank, in Gbit/s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)
