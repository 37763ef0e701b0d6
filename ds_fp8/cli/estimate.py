"""`ds_fp8 estimate FILE --params N --world-size W`: memory and wire of every level and ZeRO stage, side by side.

It helps to choose a level before there is a model to load. With `--model MODULE:FACTORY` instead of `--params` the
model's parameters are counted by what a plan does with them (frozen ones, heads, norms), and the share of its matrix
FLOPs that computes in FP8 is printed. Without a file it compares the levels for a bf16 job. Exit code 1 when the file
has problems or the plan is refused, 2 when file or model cannot be read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import config
from ..algorithms import moments_of
from ..capabilities import MACHINES, machine
from ..cost.job import Cost, cost_of
from ..cost.memory import Placement, bucket_bytes
from ..errors import ConfigError, DsFp8Error
from ..levels import LEVELS, Level
from .given import build_model, document_of
from .parameter_kinds import DEEPSPEED, Kind, kinds_of
from .tables import print_table

STAGES = (0, 1, 2, 3)

ROWS = {"AMP": DEEPSPEED, "fp8": DEEPSPEED, **LEVELS}
"""`fp8` alone changes neither states nor communication, but its layers may keep FP8 data of their weights."""

SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Job:
    """A number of parameters, and where they lie; `kinds` of them where a model was given."""

    params: int
    where: Placement
    reduce_bucket: float = 5e8
    kinds: Mapping[Kind, int] | None = None

    def at(self, stage: int, row: str) -> Placement:
        """The same job in another ZeRO stage; only rows with FP8 layers keep FP8 data of weights."""
        cached = 0 if row == "AMP" else self.where.cached_weight
        return replace(self.where, zero_stage=stage, cached_weight=cached)


def is_possible(level: Level, stage: int) -> bool:
    """FP8 weights need ZeRO."""
    return level.weight_wire == "none" or stage > 0


def cost(row: str, level: Level, stage: int, job: Job) -> Cost:
    """Bytes of one rank at a level, in a stage."""
    kinds = {Kind(): job.params} if job.kinds is None else job.kinds
    if row == "AMP":
        kinds = {replace(kind, is_fp8_alone=False): numel for kind, numel in kinds.items()}
    return cost_of((kind.at(level, numel) for kind, numel in kinds.items()), job.at(stage, row))


def main(argv: Sequence[str]) -> int:
    """Print two tables, or JSON."""
    options = _options(argv)
    try:
        settings = config.load_document(document_of(options.file)) if options.file else config.Settings()
    except ConfigError as error:
        print(error)
        return 2 if any(not problem.path for problem in error.problems) else 1
    facts = settings.deepspeed
    try:
        job, share = _job(options, settings)
    except DsFp8Error as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    except Exception as error:  # the factory is the user's code: whatever it raises is reported
        if options.model is None:
            raise
        print(f"--model {options.model}: {type(error).__name__}: {error}")
        return 2
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
        f"{job.params:,} parameters, {where.world_size} ranks, {where.base}, {where.micro_batches} micro-batch(es) per "
        "step"
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
    if where.nodes > 1:
        in_node = where.world_size // where.nodes
        title = f"Bytes that a node of {in_node} ranks sends to the others per step: gradients + weights"
        print_table(title, ["", *stages], _wire(rows, job, network=True), numbers=True)
    if options.bandwidth:
        sender = "node" if where.nodes > 1 else "rank"
        title = f"Seconds of that exchange at {options.bandwidth:g} Gbit/s per {sender}, nothing hidden"
        print_table(title, ["", *stages], _seconds(rows, job, options.bandwidth), numbers=True)
    bucket = human(bucket_bytes(replace(where, zero_stage=3), job.reduce_bucket, job.params))
    print(
        f"Activations and buffers come on top; in ZeRO 3 DeepSpeed's reduction bucket too ({bucket}). "
        + ("" if job.kinds else "O3: as if FP8 layers owned every weight. ")
        + "'-': not possible."
    )
    return 0


def _job(options: argparse.Namespace, settings: config.Settings) -> tuple[Job, str | None]:
    """(the job, the plan's sentence about FLOPs; None without a model or without fp8)."""
    facts = settings.deepspeed
    zero = facts.raw.get("zero_optimization")
    bucket = zero.get("reduce_bucket_size") if isinstance(zero, dict) else None
    kinds, share, cached = None, None, 0
    if options.model is not None:
        from ..plan import share_line

        host = machine(options.device)
        model = build_model(options.model, no_meta=False)
        kinds, plan = kinds_of(model, settings, options.device, host)
        options.params = sum(kinds.values())
        share = share_line(plan) if settings.fp8.enabled else None
    if settings.fp8.weight_cache:
        cached = _cached_weight(options, settings)
    where = Placement(
        facts.zero_stage,
        options.world_size,
        options.base or (facts.base_dtype if options.file else "bf16"),
        options.gas or facts.gradient_accumulation_steps or 1,
        facts.offload_optimizer is not None,
        facts.offload_param is not None,
        cached,
        options.nodes,
    )
    return Job(options.params, where, bucket if isinstance(bucket, (int, float)) else 5e8, kinds), share


def _cached_weight(options: argparse.Namespace, settings: config.Settings) -> int:
    """What a layer keeps of its weight depends on the device's products: as the plan has it."""
    from ..capabilities import host
    from ..plan.effective import decide_settings
    from ..plan.estimate import cached_weight

    return cached_weight(decide_settings(settings, machine(options.device) or host(options.device)).fp8)


def as_json(rows: dict[str, Level], job: Job) -> dict[str, Any]:
    """The same figures as numbers; null where a level is not possible."""
    table: dict[str, Any] = {}
    for name, level in rows.items():
        table[name] = []
        for stage in STAGES:
            found = cost(name, level, stage, job)
            entry = {
                "stage": stage,
                "resident_bytes": round(found.device.total),
                "host_bytes": round(found.host.total),
                **{f"{part}_bytes": round(size) for part, size in asdict(found.device).items()},
                "sent_gradient_bytes": round(found.gradient_wire_bytes),
                "sent_weight_bytes": round(found.weight_wire_bytes),
            }
            if job.where.nodes > 1:
                gradients, weights = _sent(found, network=True)
                entry |= {"node_sent_gradient_bytes": round(gradients), "node_sent_weight_bytes": round(weights)}
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
        found = cost(name, level, stage, job)
        size = (found.host if host else found.device).total
        return f"{human(size)} ({size / job.params:.2f} B/param)"

    return _rows(rows, cell)


def _wire(rows: dict[str, Level], job: Job, *, network: bool = False) -> list[list[str]]:
    def cell(name: str, level: Level, stage: int) -> str:
        return " + ".join(human(size) for size in _sent(cost(name, level, stage, job), network))

    return _rows(rows, cell)


def _seconds(rows: dict[str, Level], job: Job, gigabits: float) -> list[list[str]]:
    def cell(name: str, level: Level, stage: int) -> str:
        return f"{sum(_sent(cost(name, level, stage, job), job.where.nodes > 1)) * 8 / gigabits / 1e9:.3g}"

    return _rows(rows, cell)


def _sent(found: Cost, network: bool) -> tuple[float, float]:
    """(bytes of gradients, bytes of weights) that a node sends to the others, or that a rank sends."""
    if network:
        return found.network_gradient_bytes, found.network_weight_bytes
    return found.gradient_wire_bytes, found.weight_wire_bytes


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
    if not 1 <= number <= 1e18:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters of a model: 1 to 1e18")
    return round(number)


def positive(text: str) -> int:
    """A whole number of at least 1."""
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
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="DeepSpeed configuration, - for standard input; without it, bf16 is assumed",
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--params", type=count, metavar="N", help="parameters of the model: 7e9, 7B, 350M")
    size.add_argument("--model", metavar="MODULE:FACTORY", help="callable that returns the model, e.g. train:build")
    parser.add_argument("--world-size", type=positive, required=True, metavar="W", help="data-parallel ranks")
    parser.add_argument("--gas", type=positive, help="micro-batches per optimizer step (default: the file's, else 1)")
    parser.add_argument("--base", choices=("bf16", "fp16", "fp32"), help="dtype of the weights (default: the file's)")
    parser.add_argument(
        "--device",
        default="cpu",
        help=f"device to plan for: one of this machine's (cpu, cuda), or {', '.join(MACHINES)} (default: cpu)",
    )
    parser.add_argument(
        "--nodes",
        type=positive,
        default=1,
        metavar="N",
        help="nodes with NVLink over which the ranks are spread: what a node sends to the others is shown too",
    )
    parser.add_argument(
        "--bandwidth",
        type=_above_zero,
        metavar="GBIT",
        help="of the network in Gbit/s: of each node with --nodes, else of each rank",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if options.world_size % options.nodes:
        parser.error(
            f"argument --nodes: {options.world_size} ranks (--world-size) cannot be spread evenly over {options.nodes} "
            "nodes; give the nodes that the job has, each with equally many ranks"
        )
    return options
