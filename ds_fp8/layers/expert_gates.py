"""Gated activations that are known by what they compute, in one launch on a GPU; every other one is called as it is.

Known are transformers' default gate with SiLU, and gpt-oss's clamped one. On a CPU, in a dtype without a kernel, and
for a class that overrides its gate, the module's own `_apply_gate` runs.
"""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import library_for
from .batched_gradients import one_by_one


def apply(module: Any, rows: torch.Tensor) -> torch.Tensor:
    """`module._apply_gate(rows)`: rows [S, 2 * width] -> [S, width]."""
    kernels = getattr(library_for(rows.device), "gates", None)
    kind = kind_of(module) if kernels is not None and rows.dtype in kernels.FLOATS else None
    if kind is None:
        return module._apply_gate(rows)
    alpha, limit = (float(module.alpha), float(module.limit)) if kind == "clamped" else (0.0, 0.0)
    return _Gate.apply(rows.contiguous(), kind, alpha, limit, kernels)


def kind_of(module: Any) -> str | None:
    """`silu`, `clamped`, or None for a gate that has no kernel."""
    gate = getattr(type(module), "_apply_gate", None)
    name = f"{getattr(gate, '__module__', '')}.{getattr(gate, '__qualname__', '')}"
    if name == "transformers.integrations.moe._default_apply_gate":
        return "silu" if type(module.act_fn).__name__ in ("SiLU", "SiLUActivation") else None
    return "clamped" if name == "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate" else None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, kind: str, alpha: float, limit: float, kernels: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        ctx.gate, ctx.kernels = (kind, alpha, limit), kernels
        return kernels.forward(rows, kind, alpha, limit)

    @staticmethod
    @one_by_one
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return ctx.kernels.backward(rows, grad.contiguous(), *ctx.gate), None, None, None, None
