"""One GPT block of width 4096 and 16K tokens, forward and backward: bf16, ours, hand-written TE, Accelerate, torchao.

torchao's float8 is made for torch.compile, so bf16, torchao and ours are there compiled as well.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from gpt_model import Block
from ledger import Ledger, main
from measure_linear import candidates
from timing import alternate, free, host_ms
from torch import nn

from ds_fp8.recipe import Recipe

WIDTH, LENGTH, BATCH = 4096, 2048, 8


def hand_written(baseline: nn.Module, scaling: Any) -> tuple[nn.Module, Any]:
    """te.Linear and te.LayerNorm put in by hand, and the autocast that a script would open."""
    import transformer_engine.pytorch as te

    model = copy.deepcopy(baseline)
    block = model[0]
    for name, child in list(block.named_children()):
        if isinstance(child, nn.Linear):
            made = te.Linear(child.in_features, child.out_features, params_dtype=torch.bfloat16, device="cuda")
        else:
            made = te.LayerNorm(WIDTH, dtype=torch.bfloat16, device="cuda")
        made.load_state_dict(child.state_dict(), strict=False)
        setattr(block, name, made)
    return model, lambda: te.fp8_autocast(enabled=True, fp8_recipe=scaling)


def accelerated(baseline: nn.Module, scaling: Any) -> tuple[nn.Module, Any]:
    """Accelerate's convert_model, as `Accelerator(mixed_precision="fp8")` does it."""
    import transformer_engine.pytorch as te
    from accelerate import Accelerator
    from accelerate.utils.transformer_engine import convert_model

    Accelerator()  # convert_model asks for the state that this leaves behind (accelerate 1.15)
    model = copy.deepcopy(baseline)
    with torch.no_grad():
        convert_model(model)
    return model.to("cuda", torch.bfloat16), lambda: te.fp8_autocast(enabled=True, fp8_recipe=scaling)


def torchao_converted(baseline: nn.Module, scaling: Any) -> tuple[nn.Module, Any]:
    from torchao.float8 import convert_to_float8_training

    return convert_to_float8_training(copy.deepcopy(baseline)), nullcontext


def compiled(model: nn.Module, around: Any) -> tuple[nn.Module, Any]:
    """A copy under torch.compile; around: the context of its passes, as for the model itself."""
    return torch.compile(copy.deepcopy(model)), around


def body(ledger: Ledger) -> None:
    torch.manual_seed(0)
    baseline = nn.Sequential(Block(WIDTH, 4 * WIDTH)).to("cuda", torch.bfloat16)
    models = {name: (model, nullcontext) for name, model in
              candidates(ledger, baseline, [Recipe(), Recipe(kind="current")]).items()}  # fmt: skip
    for name, make in (("hand-written TE", hand_written), ("Accelerate", accelerated), ("torchao", torchao_converted)):
        try:
            from transformer_engine.common import recipe

            models[name] = make(baseline, recipe.DelayedScaling())
        except Exception as error:  # noqa: BLE001 - which peers are there is a finding
            ledger.problem(name, f"{type(error).__name__}: {str(error)[:300]}")
    for name in ("bf16", "torchao", "torch delayed", "torch current"):
        if name in models:
            models[f"{name}, compiled"] = compiled(*models[name])
    free()
    x = torch.randn(BATCH, LENGTH, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(x) * 1e-3
    works = {}
    for name, (model, around) in models.items():

        def once(model: nn.Module = model, around: Any = around) -> None:
            model.zero_grad()
            x.grad = None
            with around():
                output = model(x)
            output.backward(gradient)

        try:
            once()
            works[name] = once
        except Exception as error:  # noqa: BLE001 - which ones run is a finding
            ledger.problem(name, f"{type(error).__name__}: {str(error)[:300]}")
    times = alternate(works)
    rows = [
        {
            "block": name,
            **found,
            "x bf16": round(times["bf16"]["ms"] / found["ms"], 3),
            "x bf16, compiled": round(times["bf16, compiled"]["ms"] / found["ms"], 3)
            if "bf16, compiled" in times
            else "",
            "host ms": host_ms(works[name], repeats=10),
        }
        for name, found in times.items()
    ]
    ledger.record("forward and backward, 16K tokens", rows)


if __name__ == "__main__":
    main("block", body)
