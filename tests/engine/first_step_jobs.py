"""Models that do not do all that was planned, for `test_first_step.py`; and losses that are no numbers."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.engine.engine_jobs import WIDTH, Recomputed, Residual, batch, dtype_of, make_engine


class Partial(nn.Module):
    """A model whose `kind` says what goes another way than the plan.

    whole     nothing: every layer runs forward and backward
    past      a loss multiplies by `out.weight` itself, as fused losses do; `spare` is never called
    eval      `frozen` is called in eval mode only
    unused    the output of `spare` is in no loss
    one_rank  `spare` runs on rank 1 only
    pretrained  the whole model is in eval mode, as from_pretrained gives it
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.block = Residual()
        self.frozen = Residual().requires_grad_(False)
        self.spare = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.train(kind != "pretrained")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "eval":
            self.frozen.eval()
        x = self.frozen(self.block(x))
        rank = torch.distributed.get_rank()
        if self.kind == "unused":
            self.spare(x)
        elif self.kind != "past" and (self.kind != "one_rank" or rank == 1):
            x = x + self.spare(x)
        if self.kind == "past":
            return F.linear(x, self.out.weight).float().pow(2).mean()
        return self.out(x).float().pow(2).mean()


def first_steps(
    rank: int, world_size: int, settings: dict[str, Any], kind: str, count: int = 2, after: Any = None
) -> dict[str, Any]:
    """What is printed in each of `count` steps, and what is left on the layers afterwards."""
    import ds_fp8
    import ds_fp8.engine
    from ds_fp8.errors import DsFp8Error

    ds_fp8.activate()
    said, error, lines, losses = io.StringIO(), "", [], []
    with contextlib.redirect_stdout(said):
        torch.manual_seed(0)
        shape = kind.removeprefix("eval_")
        model = Recomputed(shape[10:]) if shape.startswith("recompute") else Partial(shape)
        model.train(model.training and shape == kind)
        engine = make_engine(settings, model)
        try:
            for step in range(count):
                start = len(said.getvalue())
                for micro in range(settings["gradient_accumulation_steps"]):
                    loss = engine(batch(rank, 10 * step + micro).to(dtype_of(settings)))
                    engine.backward(loss)
                    engine.step()
                losses.append(loss.item())
                lines.append(
                    [line for line in said.getvalue()[start:].splitlines() if "ds_fp8" in line or "exclude" in line]
                )
        except DsFp8Error as found:
            error = f"{type(found).__name__}: {found}"
    layer_states = [vars(module)["layer_state"] for module in engine.module.modules() if "layer_state" in vars(module)]
    hooks = [weight for weight in engine.module.parameters() if getattr(weight, "_post_accumulate_grad_hooks", None)]
    ours = [hook for weight in hooks for hook in weight._post_accumulate_grad_hooks.values() if "ds_fp8" in str(hook)]
    return {
        "lines": lines,
        "losses": losses,
        "error": error,
        "left": [layer_state.fqn for layer_state in layer_states if layer_state.ran is not None],
        "hooks": len(ours),
    }


class Exploding(nn.Module):
    """A loss that is NaN in the steps of `bad`."""

    def __init__(self, bad: list[int]):
        super().__init__()
        self.bad, self.step = bad, 0
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.layer(x).float().pow(2).mean()
        self.step += 1
        return loss * float("nan") if self.step in self.bad else loss


def exploding(
    rank: int, world_size: int, settings: dict[str, Any], bad: list[int], on: list[int], count: int
) -> dict[str, Any]:
    """Steps taken before the error, and the error; the losses of the ranks in `on` are NaN in the steps of `bad`."""
    import ds_fp8
    from ds_fp8.errors import NonFiniteError

    ds_fp8.activate()
    error, taken = "", 0
    with contextlib.redirect_stdout(io.StringIO()) as said:
        torch.manual_seed(0)
        engine = make_engine(settings, Exploding(bad if rank in on else []))
        try:
            for step in range(count):
                loss = engine(batch(rank, step).to(dtype_of(settings)))
                engine.backward(loss)
                engine.step()
                taken += 1
        except NonFiniteError as found:
            error = str(found)
    return {"taken": taken, "error": error, "skipped": engine.skipped_steps, "said": said.getvalue()}


def clipping(rank: int, world_size: int, settings: dict[str, Any], odd: str) -> dict[str, Any]:
    """What is said of clipped tensors in four steps; rank 1 does something `odd` before the third and fourth."""
    import ds_fp8

    ds_fp8.activate()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        torch.manual_seed(0)
        engine = make_engine(settings, Exploding([]))
        for step in range(4):
            x = batch(rank, step).to(dtype_of(settings))
            if rank == 1 and step > 1 and odd == "gradient":
                torch.autograd.grad(engine.module(x.requires_grad_()) * 1e4, x)
            if rank == 1 and step > 1 and odd == "batch":
                engine.module(x.detach() * 100)
            if rank == 1 and step > 1 and odd == "in eval mode":
                engine.eval()
                torch.autograd.grad(engine.module(x.requires_grad_()) * 1e4, x)
                engine.train()
            engine.backward(engine(x.detach()))
            engine.step()
        engine.destroy()
    return {"lines": [line for line in said.getvalue().splitlines() if "history" in line and "WARNING" in line]}


def several(rank: int, world_size: int, calls: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    return [globals()[name](rank, world_size, *arguments) for name, arguments in calls]
