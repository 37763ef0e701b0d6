"""Write `optimizers.json`: the optimizers and schedules that DeepSpeed takes by name, with their parameters.

    python schemas/generate_optimizers.py            rewrite the file
    python schemas/generate_optimizers.py --stdout   print it

DeepSpeed hands `optimizer/params` and `scheduler/params` to a constructor as they are, so the constructors' signatures
are the truth about names. Which constructor it is depends on offload and flags (Adam is DeepSpeed's fused one, the
host's, or torch's), so the parameters of all of them count as known. The kind of a parameter comes from its default; a
parameter without one is required.

    {"optimizers": {type: {parameter: kind, ...}}, "schedulers": {type: {...}}, "required": {type: [parameter, ...]}}

Kinds: `number`, `integer`, `boolean`, `string`, `numbers` (a list of numbers), `rates` (a number or a list of them),
`code` (what JSON cannot hold), `any`; a `?` behind it allows null.
Types with a null instead of parameters take whatever a package outside DeepSpeed and torch takes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent / "optimizers.json"

OURS_TO_PASS = {"params", "model_params", "model_parameters", "self", "optimizer", "args", "kwargs", "deepspeed", "mpu"}
"""Parameters that DeepSpeed or the language fills in."""

ADAM_EXTRAS = {"torch_adam": "boolean", "adam_w_mode": "boolean", "fp32_optimizer_states": "boolean"}
"""Parameters that DeepSpeed takes away before it calls an Adam."""

KIND_BY_NAME = {
    **dict.fromkeys(
        ("total_num_steps", "total_steps", "steps_per_epoch", "epochs", "T_max", "T_0", "step_size", "step_size_down"),
        "integer",
    ),
    **dict.fromkeys(("cycle_second_step_size", "cycle_second_stair_count"), "integer"),
    **dict.fromkeys(("foreach", "fused"), "boolean"),
    "gamma": "number",
    "milestones": "numbers",
}
"""Kinds of parameters whose default does not tell."""

RATES = ("lr_range_test_min_lr", "cycle_min_lr", "cycle_max_lr", "base_lr", "max_lr", "min_lr")
"""One learning rate, or one for each parameter group."""


def kind_of(parameter: inspect.Parameter) -> str:
    """The kind of values that a constructor's parameter takes, judged by its default."""
    default, name = parameter.default, parameter.name
    if name in ("lr_lambda", "schedulers", "scale_fn"):
        return "code"
    if default is inspect.Parameter.empty or default is None:
        kind = KIND_BY_NAME.get(name) or ("rates" if name.endswith("_lr") else "any")
        return kind + ("?" if default is None else "")
    if name in RATES:
        return "rates"
    if isinstance(default, bool):
        return "boolean"
    if isinstance(default, int):
        # `eps=0` and `weight_decay=0` are numbers; counts are named so.
        counted = any(part in name for part in ("step", "iter", "num", "size", "count", "last", "epoch"))
        return "integer" if counted and "rate" not in name else "number"
    if isinstance(default, float):
        return "number"
    if isinstance(default, str):
        return "string"
    if isinstance(default, (tuple, list)) and all(isinstance(item, (int, float)) for item in default):
        return "numbers"
    return "any"


def parameters_of(*classes: Any) -> tuple[dict[str, str], set[str]]:
    """(parameters of all of `classes` with their kinds, those that every one requires)."""
    kinds: dict[str, str] = {}
    required: list[set[str]] = []
    for cls in classes:
        own = {
            name: parameter
            for name, parameter in inspect.signature(cls.__init__).parameters.items()
            if name not in OURS_TO_PASS and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        }
        for name, parameter in own.items():
            kind = kind_of(parameter)
            kinds[name] = kind if kinds.get(name, kind) == kind else "any?"
        required.append({name for name, parameter in own.items() if parameter.default is inspect.Parameter.empty})
    return kinds, set.intersection(*required)


def optimizers() -> dict[str, Any]:
    """DeepSpeed's type -> classes that may serve it; None for a package that is not DeepSpeed's or torch's."""
    import torch
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    adam = (FusedAdam, DeepSpeedCPUAdam, torch.optim.Adam, torch.optim.AdamW)
    known: dict[str, Any] = {
        "adam": adam,
        "adamw": adam,
        "adagrad": (DeepSpeedCPUAdagrad, torch.optim.Adagrad),
        "lamb": (FusedLamb,),
        "lion": (DeepSpeedCPULion, FusedLion),
    }
    found = {name: known.get(name) for name in DEEPSPEED_OPTIMIZERS}
    for name, cls in vars(torch.optim).items():
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            found.setdefault(name, (cls,))
    return found


def schedulers() -> dict[str, Any]:
    """DeepSpeed's and torch's schedules by name."""
    import torch
    from deepspeed.runtime import lr_schedules

    found: dict[str, Any] = {name: (getattr(lr_schedules, name),) for name in lr_schedules.VALID_LR_SCHEDULES}
    for name, cls in vars(torch.optim.lr_scheduler).items():
        if inspect.isclass(cls) and issubclass(cls, torch.optim.lr_scheduler.LRScheduler) and not name.startswith("_"):
            found.setdefault(name, (cls,))
    return found


def _muon_parameters() -> dict[str, str] | None:
    """Muon's own keys: DeepSpeed splits them into two halves by name; None where it does not say which."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    halves = [getattr(DeepSpeedEngine, name, None) for name in ("_MUON_HALF_KEYS", "_ADAM_HALF_KEYS")]
    if None in halves:
        return None
    kinds = {"betas": "numbers", "ns_method": "any", "nesterov": "boolean", "ns_steps": "integer"}
    names = {"muon_lr", "adam_lr", "lr"}.union(*halves)
    return dict(sorted({**{name: kinds.get(name, "any") for name in names}, **ADAM_EXTRAS}.items()))


def build() -> dict[str, Any]:
    """The whole file."""
    import deepspeed

    result: dict[str, Any] = {"x-deepspeed-version": deepspeed.__version__}
    needed: dict[str, list[str]] = {}
    for part, found in (("optimizers", optimizers()), ("schedulers", schedulers())):
        result[part] = {}
        for name, classes in sorted(found.items()):
            if classes is None:
                result[part][name] = _muon_parameters() if name == "muon" else None
                continue
            kinds, required = parameters_of(*classes)
            if name in ("adam", "adamw"):
                kinds |= ADAM_EXTRAS
            result[part][name] = dict(sorted(kinds.items()))
            if required:
                needed[name] = sorted(required)
    return {**result, "required": needed}


def render(content: dict[str, Any]) -> str:
    """Stable text, so that a regenerated file shows only what DeepSpeed or torch changed."""
    return json.dumps(content, indent=1) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write optimizers.json from the installed DeepSpeed and torch.")
    parser.add_argument("--stdout", action="store_true", help="print instead of writing the file")
    text = render(build())
    if parser.parse_args(argv).stdout:
        sys.stdout.write(text)
    else:
        TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
