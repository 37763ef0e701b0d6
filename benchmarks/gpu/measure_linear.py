"""One linear layer 4096 x 4096, forward and backward, by number of tokens: bf16, our torch backend, Transformer Engine.

Device time between events, and the host's time to enqueue: FP8 by te.Linear loses below about 8K tokens for host time.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from ledger import Ledger, main
from timing import alternate, free, host_ms
from torch import nn

from ds_fp8.config.settings import Fp8Settings, LayerSettings, Settings
from ds_fp8.layers import swap_layers
from ds_fp8.plan import make_plan
from ds_fp8.recipe import Recipe


def swapped(model: nn.Module, backend: str, recipe: Recipe) -> nn.Module:
    """A copy of `model` under one backend, by a plan as the JSON would make it."""
    counterpart = copy.deepcopy(model)
    plan = make_plan(
        counterpart,
        Settings(Fp8Settings(True, recipe=recipe, backend="torch", layers=LayerSettings(min_features=16))),
        device="cuda",
    )
    swap_layers(counterpart, replace(plan, fp8=replace(plan.fp8, backend=backend)))
    return counterpart


def passes(model: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> Any:
    def once() -> None:
        model.zero_grad()
        x.grad = None
        model(x).backward(gradient)

    return once


def candidates(ledger: Ledger, baseline: nn.Module, recipes: list[Recipe]) -> dict[str, nn.Module]:
    """The unmodified model and every backend with every recipe that builds here."""
    found = {"bf16": baseline}
    for backend in ("torch", "transformer_engine"):
        for recipe in recipes:
            name = f"{backend} {recipe.kind}"
            try:
                found[name] = swapped(baseline, backend, recipe)
            except Exception as error:  # noqa: BLE001 - which ones build is a finding
                ledger.problem(name, f"{type(error).__name__}: {str(error)[:300]}")
    return found


def table(ledger: Ledger, models: dict[str, nn.Module], width: int, tokens: int) -> list[dict[str, Any]]:
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) * 1e-3
    works = {}
    for name, model in models.items():
        work = passes(model, x, gradient)
        try:
            work()
            works[name] = work
        except Exception as error:  # noqa: BLE001 - which ones run is a finding
            ledger.problem(f"{name}, {tokens} tokens", f"{type(error).__name__}: {str(error)[:300]}")
    times = alternate(works)
    rows = []
    for name, found in times.items():
        row = {"width": width, "tokens": tokens, "layer": name, "ms": found["ms"], "spread": found["spread"]}
        row |= {"x bf16": round(times["bf16"]["ms"] / found["ms"], 3), "host ms": host_ms(works[name])}
        rows.append(row)
    return rows


def body(ledger: Ledger) -> None:
    recipes = [Recipe(), Recipe(kind="current"), Recipe(kind="block")]
    rows: list[dict[str, Any]] = []
    for width in (4096, 2048, 1024, 8192):
        torch.manual_seed(0)
        baseline = nn.Sequential(nn.Linear(width, width)).to("cuda", torch.bfloat16)
        models = candidates(ledger, baseline, recipes)
        for tokens in (1024, 4096, 16384):
            if ledger.left() < 20:
                ledger.problem(f"width {width}, {tokens} tokens", "no time left")
                continue
            rows += table(ledger, models, width, tokens)
            ledger.record("forward and backward", rows)
        del models, baseline
        free()


if __name__ == "__main__":
    main("linear", body)
