"""Jobs for `test_weights_tools.py`: torch's transforms, tracers and writers of files at O3, on real ranks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from reads_jobs import batch, loss_of, start, train
from torch.fx.experimental.proxy_tensor import make_fx


def transforms(weight: Any, wide: torch.Tensor) -> dict[str, torch.Tensor]:
    """What torch.func makes of a weight that is its own argument."""

    def norm(weight: torch.Tensor) -> torch.Tensor:
        return (wide @ weight).float().pow(2).sum()

    return {
        "vmap": torch.vmap(lambda row: row * 2)(weight),
        "grad": torch.func.grad(norm)(weight),
        "vjp": torch.func.vjp(norm, weight)[1](torch.tensor(1.0))[0],
        "jvp": torch.func.jvp(norm, (weight,), (torch.ones_like(weight),))[1],
        "jacrev": torch.func.jacrev(lambda w: wide[0] @ w)(weight),
        "jacfwd": torch.func.jacfwd(lambda w: (wide[0] @ w)[:2])(weight),
        "hessian": torch.func.hessian(lambda w: (w[0, :4].float() ** 2).sum())(weight)[0, :4, 0, :4],
    }


def transformed(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """Each result on released weights beside the one on their values."""
    from ds_fp8.zero.weights_released import is_released

    engine = start("O3", stage)
    model, found = engine.module, {}
    wide = torch.randn(8, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = batch(7, rank)[:8]

    def loss(weights: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (one,)).float().pow(2).mean()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))
    for step in range(2, 6, 2):  # memory that a transform was given is gone with the next step
        train(engine, rank, range(step, step + 2))
        weight, values = model.mid.weight, {name: p.clone().detach() for name, p in model.named_parameters()}
        given, wanted = transforms(weight, wide), transforms(values["mid.weight"], wide)
        for name, one in given.items():
            found[f"{name} {step}"] = torch.equal(one, wanted[name])
        pairs = {
            "of the model": (
                torch.func.grad(loss)(dict(model.named_parameters()), x),
                torch.func.grad(loss)(values, x),
            ),
            "per sample": (per_sample(dict(model.named_parameters()), x[:, None]), per_sample(values, x[:, None])),
        }
        for name, pair in pairs.items():
            found[f"{name} {step}"] = all(torch.equal(pair[0][key], pair[1][key]) for key in values)
        found[f"released {step}"] = is_released(weight) and is_released(model.enc.weight)
    rows = torch.nested.nested_tensor([x[:3], x], layout=torch.jagged)
    high = torch.func.functional_call(model, values, (x,))
    found["jagged"] = torch.allclose(model(rows).values()[3:].float(), high.float(), rtol=0.1, atol=0.1)
    found["vmap of the model"] = torch.allclose(torch.vmap(model)(x).float(), high.float(), rtol=0.1, atol=0.1)
    engine.destroy()
    found["torch's own"] = torch._functorch.eager_transforms._wrap_for_grad.__module__ != "ds_fp8.zero.weights_wrapped"
    return found


def written_down(rank: int, world_size: int, stage: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Tracers and files; what O3 refuses, with its words."""
    import deepspeed
    from safetensors.torch import load_file, save_file

    from ds_fp8.errors import LayerError, WeightError

    engine = start("O3", stage)
    model, found, refused = engine.module, {}, {}
    train(engine, rank, range(2))
    x = batch(7, rank)[:8]
    wanted = model(x).detach().float()

    def close(output: torch.Tensor) -> bool:
        return torch.allclose(output.detach().float(), wanted, rtol=0.1, atol=0.1)

    found["fx"] = close(torch.fx.symbolic_trace(model)(x))
    found["export"] = close(torch.export.export(model, (x,)).module()(x))
    rows = torch.randn(8, model.mid.in_features, generator=torch.Generator().manual_seed(5)).bfloat16()
    by_row = torch.compile(torch.vmap(model.mid), backend="aot_eager")(rows)
    found["compiled vmap"] = torch.allclose(by_row, torch.vmap(model.mid)(rows), rtol=0.02, atol=0.02)
    model.eval()
    found["export in eval"] = close(torch.export.export(model, (x,)).module()(x))
    tools = {
        "trace": lambda: torch.jit.trace(model, x),
        "script": lambda: torch.jit.script(model.mid),
        "offload_states": engine.offload_states,
        "make_fx": lambda: make_fx(model)(x),
        "fake": lambda: make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    }
    for name, tool in tools.items():
        try:
            tool()
            refused[name] = "was not refused"
        except (WeightError, LayerError) as error:
            refused[name] = str(error)
    folder = Path(tempfile.mkdtemp())
    values = {name: p.clone().detach() for name, p in model.named_parameters()}
    save_file(dict(model.named_parameters()), folder / "parameters")
    save_file({name: p.data for name, p in model.named_parameters()}, folder / "data")
    for name in ("parameters", "data"):
        loaded = load_file(folder / name)
        found[f"safetensors {name}"] = all(torch.equal(loaded[key], values[key]) for key in values)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found["traced when gathered"] = close(torch.jit.trace(model, x)(x))
        found["make_fx when gathered"] = close(make_fx(model)(x)(x))
    engine.destroy()
    return found, refused


def tied_since(rank: int, world_size: int, stage: int) -> dict[str, list[float]]:
    """A layer takes another Parameter after the engine was made: a wider one of its own, then another layer's."""
    found = {}
    for level in (None, "O2", "O3"):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        layers.kind = ""
        engine = start(level, stage, model=layers)
        losses = train(engine, rank, range(2))
        layers[2].weight = torch.nn.Parameter(torch.eye(64).bfloat16())
        with torch.no_grad():
            losses.append(loss_of(engine, 7, rank).item())
        layers[2].weight = layers[0].weight
        found[str(level)] = losses + train(engine, rank, range(2, 5))
        engine.destroy()
    return found
