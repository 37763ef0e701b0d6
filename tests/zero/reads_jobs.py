"""Jobs that read and write weights from outside of their layers, as scripts do."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Coder(nn.Module):
    """Two layers; `kind` says who else reads the first one's weight in the forward."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.enc = nn.Linear(64, 96)
        self.mid = nn.Linear(96, 96)
        self.dec = nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, self.enc.weight, self.enc.bias) if self.kind == "functional" else self.enc(x)
        hidden = self.mid(hidden)
        return F.linear(hidden, self.enc.weight.t()) if self.kind == "tied" else self.dec(hidden)


def start(
    level: str | None, stage: int, kind: str = "", recipe: str = "delayed", model: Any = None, **msamp: Any
) -> Any:
    """An engine as a script makes it; None is DeepSpeed alone."""
    import deepspeed

    import ds_fp8

    ds_fp8.activate()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
    }
    if level:
        config["fp8"] = {"enabled": True, "backend": "torch", "recipe": recipe}
        config["msamp"] = {"enabled": True, "opt_level": level, **msamp}
    torch.manual_seed(0)
    model = Coder(kind) if model is None else model
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def batch(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(32, 64, generator=generator).bfloat16()


def loss_of(engine: Any, step: int, rank: int) -> torch.Tensor:
    x = batch(step, rank)
    loss = (engine(x) - x).float().pow(2).mean()
    if engine.module.kind == "penalty":
        loss = loss + 1e-3 * sum(p.float().pow(2).sum() for p in engine.module.parameters())
    return loss


def train(engine: Any, rank: int, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(engine, step, rank)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def reads(weight: Any) -> dict[str, torch.Tensor]:
    """One weight read in many ways; each gives values that the caller compares with the 16-bit ones."""
    found = {
        "data": weight.data,
        "detach": weight.detach(),
        "clone": weight.clone(),
        "float": weight.float(),
        "to": weight.to(torch.float64),
        "cpu": weight.cpu(),
        "view": weight.view(-1).view(weight.shape),
        "t": weight.t().t(),
        "rows": torch.stack(list(weight)),
        "slices": torch.cat([weight[:5], weight[5:]]),
        "numpy": torch.from_numpy(weight.detach().float().numpy()),
        "vector": nn.utils.parameters_to_vector([weight]).view(weight.shape),
        "as_subclass": weight.as_subclass(torch.Tensor),
        "foreach": torch._foreach_mul([weight], 1.0)[0],
        "matmul": torch.eye(weight.shape[0], dtype=weight.dtype) @ weight,
        "out": torch.mul(weight.detach(), 1.0, out=torch.empty_like(weight)),
        "copy_": torch.empty(weight.shape).copy_(weight.data),
        "item": torch.tensor([[one.item() for one in row[:4]] for row in weight[:4]]),
        "deepcopy": copy.deepcopy(weight),
        "save": _saved({"weight": weight})["weight"],
        "save data": _saved({"weight": weight.data})["weight"],
        "vmap": torch.vmap(lambda row: row * 1.0)(weight.detach()),
        "C++ operator": _twice()(weight) / 2,
        "operator": torch.ops.aten.mul.Tensor(weight.data, 1.0),
    }
    return {name: tensor.detach().float() for name, tensor in found.items()}


@functools.cache
def _twice() -> Any:
    """An operator as an extension in C++ registers its own."""
    library = torch.library.Library("ds_fp8_reads", "DEF")
    library.define("twice(Tensor weight) -> Tensor")
    library.impl("twice", lambda weight: weight * 2, "CompositeImplicitAutograd")
    _libraries.append(library)
    return torch.ops.ds_fp8_reads.twice


_libraries: list[Any] = []


def _saved(what: Any) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def writes(model: Any) -> dict[str, Any]:
    """Ways to write to a weight, in place or by its memory."""
    weight, other = model.mid.weight, torch.zeros(96, 96, dtype=torch.bfloat16)

    def no_grad(function: Any) -> Any:
        return torch.no_grad()(function)

    def assign() -> None:
        weight.data = other

    def item() -> None:
        weight[0, 0] = 1.0

    def add() -> None:
        weight.data += other

    return {
        "clamp_": no_grad(lambda: weight.clamp_(-0.05, 0.05)),
        "data.clamp_": lambda: weight.data.clamp_(-0.05, 0.05),
        "detach().mul_": lambda: weight.detach().mul_(2),
        "view of data": weight.data.view(-1)[:3].zero_,
        "data = ": assign,
        "data +=": add,
        "item": no_grad(item),
        "copy_": no_grad(lambda: weight.copy_(other)),
        "out": no_grad(lambda: torch.add(other, other, out=weight)),
        "init": lambda: nn.init.normal_(weight),
        "foreach": no_grad(lambda: torch._foreach_mul_([weight], 0.9)),
        "vector_to_parameters": lambda: nn.utils.vector_to_parameters(torch.zeros(96 * 96), [weight]),
        "operator": no_grad(lambda: torch.ops.aten.mul_.Tensor(weight.data, 2.0)),
        "half": model.mid.half,
        "relu": lambda: F.relu(weight.data, inplace=True),
        "sgd": lambda: _sgd(weight),
    }


def _sgd(weight: Any) -> None:
    weight.grad = torch.ones(96, 96, dtype=torch.bfloat16)
    try:
        torch.optim.SGD([weight], lr=0.1).step()
    finally:
        weight.grad = None
