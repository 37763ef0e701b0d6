"""What scripts do besides forward, backward and step, one function each; they run under DeepSpeed alone and with our
sections.

The scripts are in `scripts/`. A script is `name(make, rank) -> numbers`: `make(model)` is `deepspeed.initialize` with
the JSON of the case. On a CPU over gloo, or on one GPU or several.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 64
SCRIPTS: dict[str, Callable[..., Any]] = {}
NOT_IN: dict[str, tuple[int, ...]] = {}
"""Stages in which DeepSpeed alone cannot do it."""

WRITES: set[str] = set()
"""Scripts that write to weights between steps: O3 in ZeRO 1 and 2 refuses them by name."""


class Found(NamedTuple):
    """What a script did: its numbers, flat, and the norm of how far the weights of each of its engines moved."""

    numbers: list[float]
    moved: list[float]


def script(*, not_in: tuple[int, ...] = (), writes: bool = False) -> Callable[[Callable], Callable]:
    def add(function: Callable) -> Callable:
        SCRIPTS[function.__name__], NOT_IN[function.__name__] = function, not_in
        if writes:
            WRITES.add(function.__name__)
        return function

    return add


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mid, self.dec = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dec(F.gelu(self.mid(F.gelu(self.enc(x)))))


def config(stage: int, gas: int = 1, dtype: str = "bf16", **sections: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        dtype: {"enabled": True},
        **sections,
    }


def maker(stage: int, sections: dict[str, Any], made: list[Any]) -> Callable[..., Any]:
    """`make(model, params)`: an engine; the model's weights are those of seed 1 in every mode.

    made  takes each engine, with the weights that it starts from
    """

    def make(model: nn.Module | None = None, params: Iterable[Any] | None = None, gas: int = 1) -> Any:
        import deepspeed

        model = Mlp() if model is None else model
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * param.shape[-1] ** -0.5)
        params = list(model.parameters() if params is None else params)
        before = {name: param.detach().bfloat16().float() for name, param in model.named_parameters()}
        with contextlib.redirect_stdout(io.StringIO()):
            settings = config(stage, gas, **sections)
            engine = deepspeed.initialize(model=model, model_parameters=params, config=settings)[0]
        made.append((engine, before))
        return engine

    return make


def moved(engine: Any, before: dict[str, torch.Tensor]) -> float:
    """Norm of what became of the weights since; collective. A loss near 1 does not tell a model that stands still."""
    import deepspeed

    params = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values()), modifier_rank=None), torch.no_grad():
        changes = [params[name].float().cpu() - value for name, value in before.items() if name in params]
    return torch.stack([change.norm() for change in changes]).norm().item()


def data(engine: Any, step: int, rows: int = 16) -> torch.Tensor:
    rank = torch.distributed.get_rank()
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))
    return x.to(engine.device, torch.bfloat16)


def loss_of(engine: Any, x: torch.Tensor) -> torch.Tensor:
    return (engine(x) - x.detach()).float().pow(2).mean()


def take(engine: Any, loss: torch.Tensor) -> float:
    engine.backward(loss)
    engine.step()
    return loss.item()


def train(engine: Any, steps: range) -> list[float]:
    return [take(engine, loss_of(engine, data(engine, step))) for step in steps]


def norm(x: torch.Tensor) -> float:
    return x.detach().float().norm().item()


def load() -> dict[str, Callable[..., Any]]:
    """All scripts, by name."""
    from tests.engine.scripts import flow, models, tools, weights  # noqa: F401  they register themselves

    return SCRIPTS


def run(stage: int, sections: dict[str, Any], name: str, rank: int) -> Found | str:
    """What one script did; or the error's type and text."""
    made: list[Any] = []
    try:
        numbers = list(_flat(load()[name](maker(stage, sections, made), rank)))
        return Found(numbers, [moved(engine, before) for engine, before in made])
    except pytest.skip.Exception:
        return Found([], [])
    except Exception as error:  # noqa: BLE001  judged by the caller
        return f"{type(error).__name__}: {error}"


def _flat(found: Any) -> Iterable[float]:
    if isinstance(found, (list, tuple)):
        for one in found:
            yield from _flat(one)
    else:
        yield float(found)


def several(rank: int, world_size: int, cases: list[tuple[str, int, str, dict[str, Any]]]) -> dict[Any, Any]:
    """Each case (script, stage, mode, sections) in turn."""
    import ds_fp8

    ds_fp8.activate()
    found = {}
    for name, stage, mode, sections in cases:
        found[name, stage, mode] = run(stage, sections, name, rank)
        torch.distributed.barrier()
    return found
