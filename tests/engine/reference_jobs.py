"""Engines without an optimizer: a frozen reference model made from the policy's JSON, and evaluation alone."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from tests.engine.engine_jobs import Net, batch, make_engine, steps


def of_reference(settings: dict[str, Any]) -> dict[str, Any]:
    """What RLHF libraries make of the policy's JSON: no optimizer, no scheduler, and no ZeRO unless it is stage 3."""
    kept = {key: value for key, value in settings.items() if key not in ("optimizer", "scheduler")}
    stage = settings["zero_optimization"]["stage"]
    return {**kept, "zero_optimization": {"stage": 3 if stage == 3 else 0}}


def reference(rank: int, world_size: int, settings: dict[str, Any], steps_of_policy: int = 2) -> dict[str, Any]:
    """A reference and a policy with equal weights: what each computes before and after the policy learns."""
    import ds_fp8
    import ds_fp8.engine

    ds_fp8.activate()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        frozen = make_engine(of_reference(settings))
        frozen.module.eval()
        policy = make_engine(settings)
        x = batch(rank, 1).to(torch.bfloat16)
        with torch.no_grad():
            before = frozen(x).item()
        first = policy(x)
        policy.backward(first)
        policy.step()
        losses = steps(policy, settings, rank, 1, 1 + steps_of_policy)
        with torch.no_grad():
            after = frozen(x).item()
    attachment = ds_fp8.engine.of(frozen)
    return {
        "said": said.getvalue(),
        "attached": attachment is not None,
        "before": before,
        "after": after,
        "policy": first.item(),
        "losses": losses,
        "unmodified": baseline_loss(x),
        "recipe": attachment.plan.fp8.recipe.kind if attachment else "",
    }


def baseline_loss(x: torch.Tensor) -> float:
    torch.manual_seed(0)
    with torch.no_grad():
        return Net().to(torch.bfloat16)(x).item()


def refused(rank: int, world_size: int, settings: dict[str, Any]) -> str:
    """The error of a reference engine."""
    import ds_fp8
    from ds_fp8.errors import DsFp8Error

    ds_fp8.activate()
    try:
        make_engine(of_reference(settings))
    except DsFp8Error as error:
        return str(error)
    return ""


def several(rank: int, world_size: int, calls: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    return [globals()[name](rank, world_size, *arguments) for name, arguments in calls]
