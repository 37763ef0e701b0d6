"""Where the time of one linear pass goes, on the device and on the host: 4096 x 4096, forward and backward, 4K tokens.

kernels     microseconds of a pass on the device, by kernel (torch.profiler)
host        microseconds of a pass on the host, by operation, the operation's own (torch.profiler; the profiler adds to
            each)
floor       what a pass needs on the host at least: an autograd function that only allocates its results
graph       a pass replayed as a CUDA graph: what is left when the host is out of the way
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from ledger import Ledger, main
from measure_linear import candidates, passes
from timing import alternate, host_ms
from torch import nn

from ds_fp8.recipe import Recipe

WIDTH, TOKENS, REPEATS = 4096, 4096, 20


class Nothing(torch.autograd.Function):
    """Allocates what a linear layer allocates, and computes nothing."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        return x.new_empty(x.shape[0], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors)


class NothingLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Nothing.apply(x, self.weight, self.bias)


def profiled(work: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds per pass: by kernel on the device, by operation on the host (its own time)."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(REPEATS):
            work()
        torch.cuda.synchronize()
    device: dict[str, float] = defaultdict(float)
    host: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device:
            device[event.key[:80]] += event.self_device_time_total / REPEATS
        else:
            host[f"{event.key[:60]} x{event.count / REPEATS:g}"] += event.self_cpu_time_total / REPEATS
    return tuple({key: round(value, 1) for key, value in sorted(found.items(), key=lambda item: -item[1])[:16]}
                 for found in (device, host))  # type: ignore[return-value]  # fmt: skip


def graph_ms(model: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> float:
    """Milliseconds of a replayed forward and backward."""
    parameters = [x, *model.parameters()]

    def once() -> None:
        torch.autograd.grad(model(x), parameters, gradient)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return alternate({"graph": graph.replay})["graph"]["ms"]


def body(ledger: Ledger) -> None:
    torch.manual_seed(0)
    baseline = nn.Sequential(nn.Linear(WIDTH, WIDTH)).to("cuda", torch.bfloat16)
    models = candidates(ledger, baseline, [Recipe(), Recipe(kind="current"), Recipe(kind="block")])
    floor = nn.Sequential(NothingLinear(WIDTH, WIDTH)).to("cuda", torch.bfloat16)
    x = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16) * 1e-3
    works = {name: passes(model, x, gradient) for name, model in (models | {"floor": floor}).items()}
    ledger.record("host ms", {name: host_ms(work, repeats=100) for name, work in works.items()})
    ledger.record("ms", {name: found["ms"] for name, found in alternate(works, repeats=30).items()})
    for name in ("bf16", "torch current", "torch block"):
        ledger.attempt(f"graph ms, {name}", lambda name=name: graph_ms(models[name], x, gradient))
    for name in ("bf16", "torch delayed", "torch current", "torch block", "transformer_engine delayed"):
        if name in works:
            device, host = profiled(works[name])
            ledger.record(f"kernels, us per pass: {name}", device | {"all": round(sum(device.values()), 1)})
            ledger.record(f"host, us per pass: {name}", host)


if __name__ == "__main__":
    main("profile", body)
