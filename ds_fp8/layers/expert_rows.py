"""What happens to the rows of experts between their products: sorted, biased, gated, put back.

Autograd's own backward of an index adds into places by sorting them first, on a GPU slower than the products around it.
Here every token has equally many rows, so what is spread comes back by the inverse permutation and a sum; and the
gradient of a bias is a sum over rows that lie together already.
"""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import grouped as casts
from ..kernels import library_for
from .batched_gradients import one_by_one
from .groups import Groups


class Visits:
    """Where the rows of tokens that visit experts go.

    index  [tokens, k] the experts that each token visits
    order  [tokens * k] visit number of each row, sorted by expert, stable;  back  its inverse
    owner  [tokens * k] expert of each row
    """

    def __init__(self, index: torch.Tensor):
        self.each = index.shape[-1]
        self.owner, self.order = index.reshape(-1).sort(stable=True)
        self.back = torch.empty_like(self.order)
        self.back.scatter_(0, self.order, torch.arange(self.order.numel(), device=self.order.device))

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, H] -> a row [H] for each visit, sorted by expert."""
        return _Spread.apply(tokens, self)

    def returned(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Rows [tokens * k, H] sorted by expert -> [tokens, H]: the sum of each token's, times `weights` [tokens,
        k].
        """
        return _Sum.apply(rows, weights, self)


def biased(rows: torch.Tensor, bias: torch.Tensor, groups: Groups) -> torch.Tensor:
    """rows [S, N] sorted by expert, plus the bias [E, N] of each one's expert."""
    return _Bias.apply(rows, bias, groups)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, visits: Visits) -> torch.Tensor:  # type: ignore[override]
        ctx.visits = visits
        return tokens[visits.order // visits.each]

    @staticmethod
    @one_by_one
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _summed(grad.contiguous(), ctx.visits, None), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, visits: Visits) -> torch.Tensor:  # type: ignore[override]
        rows, flat = rows.contiguous(), weights.detach().reshape(-1).contiguous()
        ctx.save_for_backward(rows, flat)
        ctx.visits, ctx.shape = visits, weights.shape
        return _summed(rows, visits, flat)

    @staticmethod
    @one_by_one
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        (rows, weights), visits = ctx.saved_tensors, ctx.visits
        grad = grad.contiguous()
        kernels = _kernels(rows)
        if kernels is not None:
            grad_rows, grad_weights = kernels.sum_visits_backward(grad, rows, visits.order, visits.each, weights)
        else:
            spread = grad[visits.order // visits.each]
            grad_rows = (spread * weights[visits.order].unsqueeze(1)).to(rows.dtype)
            grad_weights = (spread.float() * rows.float()).sum(1)[visits.back]
        return grad_rows, grad_weights.view(ctx.shape).to(weights.dtype), None


def _summed(rows: torch.Tensor, visits: Visits, weights: torch.Tensor | None) -> torch.Tensor:
    kernels = _kernels(rows)
    if kernels is not None:
        return kernels.sum_visits(rows, visits.back, visits.each, weights)
    rows = rows[visits.back]
    if weights is not None:
        rows = rows * weights.unsqueeze(1)
    return rows.view(-1, visits.each, rows.shape[-1]).sum(1)


def _kernels(rows: torch.Tensor) -> Any:
    found = getattr(library_for(rows.device), "visits", None)
    return found if found is not None and rows.dtype in found.FLOATS and rows.shape[-1] <= found.WIDEST else None


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, bias: torch.Tensor, groups: Groups) -> torch.Tensor:  # type: ignore[override]
        ctx.groups, ctx.dtype = groups, bias.dtype
        return casts.add_rows(rows.contiguous(), bias.detach().contiguous(), groups.table)

    @staticmethod
    @one_by_one
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        return grad, casts.sum_rows(grad.contiguous(), ctx.groups.table).to(ctx.dtype), None
