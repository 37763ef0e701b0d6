"""`ds_fp8 explain FILE [--model module:factory]`: what is in force, where each value comes from, and what it will do.

Without a model: every key of both sections with its effective value and its origin (the file, the level, a default).
With one: the plan, i.e. the banner a job prints, the decision for every module with its reason, and the bytes. The
factory is called without arguments in the current folder, on the meta device when it can be, so that a model of any
size fits. Exit code 1 when settings or plan are refused, 2 when file or model cannot be read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .. import config
from ..capabilities import ASSUMED, MACHINES, machine
from ..config import contract
from ..errors import ConfigError, DsFp8Error
from ..levels import LEVELS
from .estimate import human, positive
from .given import build_model, document_of
from .tables import print_table

if TYPE_CHECKING:
    from ..plan import Plan

ELSEWHERE = frozenset({"recipe", "layers", "telemetry", "implied", "level", "explicit"})
"""Fields of a section's settings that are shown apart, or are no keys of the JSON."""

UNSET = {"path": "none: monitor only", "checkpoint_on_signal": "off"}
"""What a key without a value means; elsewhere the plan decides."""


def main(argv: Sequence[str]) -> int:
    """Explain one configuration."""
    options = _options(argv)
    try:
        settings = config.load_document(document_of(options.file))
    except ConfigError as error:
        print(error)
        return 2 if any(not problem.path for problem in error.problems) else 1
    if options.model is None:
        return _print_settings(settings, options.json)
    try:
        model = build_model(options.model, options.no_meta)
    except Exception as error:  # noqa: BLE001  # the factory is the user's code: whatever it raises is reported
        print(f"--model {options.model}: {type(error).__name__}: {error}")
        return 2
    return _print_plan(model, settings, options)


def effective_settings(settings: config.Settings) -> Iterator[tuple[str, str, str, str]]:
    """(key, effective value, origin, unit) of every key of the sections that are on."""
    fp8, msamp = settings.fp8, settings.msamp
    given = {name: settings.deepspeed.raw.get(name) or {} for name in contract.SECTIONS}
    if fp8.enabled:
        recipe = {**asdict(fp8.recipe), "recipe": fp8.recipe.kind}
        recipe["override_linear_precision"] = list(fp8.recipe.override_linear_precision)
        own = {key: value for key, value in asdict(fp8).items() if key not in ELSEWHERE}
        own["compile"] = fp8.compile is not None
        yield from _rows("fp8", "fp8", {**recipe, **own}, given["fp8"], "msamp" if fp8.implied or msamp.use_te else "")
        yield from _rows("layers", "fp8/layers", asdict(fp8.layers), _sub(given["fp8"], "layers"), "")
        if fp8.compile is not None:
            yield from _rows("compile", "fp8/compile", asdict(fp8.compile), _sub(given["fp8"], "compile"), "")
    if msamp.level is not None:
        name = msamp.level.name
        level = {key: value for key, value in asdict(msamp).items() if key not in ELSEWHERE}
        level |= {**asdict(msamp.level), "opt_level": name}
        yield from _rows("msamp", "msamp", level, given["msamp"], name)
    if settings.enabled:
        home = "fp8" if fp8.enabled else "msamp"
        yield from _rows(
            "telemetry", f"{home}/telemetry", asdict(settings.telemetry), _sub(given[home], "telemetry"), ""
        )


def _rows(
    section: str, prefix: str, values: dict[str, Any], given: dict[str, Any], deciding: str
) -> Iterator[tuple[str, str, str, str]]:
    for key, entry in contract.properties(section).items():
        if key not in values:
            continue
        value, written = values[key], given.get(key, "auto")
        if written != "auto":
            origin = "file"
        elif deciding in LEVELS and hasattr(LEVELS[deciding], key):
            origin = f"level {deciding}" if value == getattr(LEVELS[deciding], key) else "follows another key"
        elif deciding and value is not None and value != entry.get("default"):
            origin = "msamp"
        else:
            origin = "default"
        absent = UNSET.get(key, "decided by the plan")
        shown = absent if value is None else value if isinstance(value, str) else json.dumps(value)
        yield f"{prefix}/{key}", shown, origin, entry.get("x-unit", "")


def _sub(given: dict[str, Any], key: str) -> dict[str, Any]:
    value = given.get(key, {})
    return value if isinstance(value, dict) else {}


def _print_settings(settings: config.Settings, as_json: bool) -> int:
    rows = list(effective_settings(settings))
    facts = asdict(settings.deepspeed)
    facts.pop("raw")
    if facts.pop("dtype_is_auto"):
        facts["base_dtype"] = settings.deepspeed.dtype
    if as_json:
        keys = [{"key": key, "value": value, "origin": origin, "unit": unit} for key, value, origin, unit in rows]
        print(json.dumps({"settings": keys, "deepspeed": facts, "notes": settings.notes}))
        return 0
    if rows:
        print_table(f"{settings.source}: effective settings", ["key", "value", "from", "unit"], rows)
    else:
        print(f"{settings.source}: neither fp8 nor msamp is on; training is DeepSpeed's own")
    sections = [
        [key, "client's" if key == "optimizer" and value is None else "-" if value is None else str(value)]
        for key, value in facts.items()
    ]
    print_table("DeepSpeed's own sections", ["fact", "value"], sections)
    for note in settings.notes:
        print(f"note: {note}")
    return 0


def _print_plan(model: Any, settings: config.Settings, options: argparse.Namespace) -> int:
    from ..plan import estimate, make_plan

    facts = settings.deepspeed
    try:
        host = machine(options.device)
        plan = make_plan(model, settings, device=options.device, world_size=options.world_size, host=host)
    except DsFp8Error as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    cost = estimate(
        plan,
        micro_batches=facts.gradient_accumulation_steps or 1,
        offload_optimizer=facts.offload_optimizer is not None,
        offload_param=facts.offload_param is not None,
    )
    if options.json:
        print(json.dumps({"plan": json.loads(plan.to_json()), "digest": plan.digest(), "estimate": asdict(cost)}))
        return 0
    print(plan.banner())
    rows = [
        [decision.fqn, decision.kind, "x".join(map(str, decision.shape)), decision.target or "kept", decision.reason]
        for decision in plan.modules
    ]
    print_table("Modules", ["module", "kind", "shape", "becomes", "reason"], rows)
    _print_products(plan)
    host_part = f", {human(cost.host.total)} on the host" if cost.host.total else ""
    print(
        f"{human(cost.resident_bytes)} per rank for weights, gradients, masters and states{host_part}; "
        f"{human(cost.wire_bytes)} sent per rank and step (ZeRO {cost.zero_stage}, {cost.world_size} ranks)"
    )
    if host is not None and host.transformer_engine == ASSUMED:
        print(f"planned for {host}, assuming that Transformer Engine is installed there")
    return 0


def _print_products(plan: Plan) -> None:
    """Where the model's matrix FLOPs are, largest first."""
    total = sum(product.macs for product in plan.products)
    rows = [
        [
            product.name,
            f"{2 * product.macs / 1e6:.3g}",
            f"{product.macs / total:.1%}",
            "FP8" if product.fp8 else "high precision",
            product.reason,
        ]
        for product in sorted(plan.products, key=lambda product: -product.macs)
    ]
    if rows:
        head = ["product", "MFLOPs per token, forward", "share", "computes in", "reason"]
        print_table(f"Matrix products, in sequences of {plan.length} tokens", head, rows)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ds_fp8 explain", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE", help="DeepSpeed configuration; - for standard input")
    parser.add_argument(
        "--model", metavar="MODULE:FACTORY", help="callable that returns the model, e.g. train:build_model"
    )
    parser.add_argument(
        "--no-meta", action="store_true", help="with --model: build the model for real, if it cannot be built on meta"
    )
    parser.add_argument(
        "--device",
        help="with --model: device to plan for: one of this machine's (cpu, cuda), or "
        f"{', '.join(MACHINES)} (default: cpu)",
    )
    parser.add_argument("--world-size", type=positive, metavar="W", help="with --model: ranks to plan for (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    planned = {"--device": options.device, "--world-size": options.world_size, "--no-meta": options.no_meta or None}
    if options.model is None and (alone := [name for name, value in planned.items() if value is not None]):
        parser.error(f"{', '.join(alone)}: what is planned is a model; give --model MODULE:FACTORY too")
    options.device = "cpu" if options.device is None else options.device
    options.world_size = options.world_size or 1
    return options
