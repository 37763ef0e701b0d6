"""What happens to the rows of experts between their products: sorted, biased, gated, put back.

Autograd's own backward of an index adds into places by sorting them first, on a GPU slower than the products around it. Here
every index is a permutation, or one with equally many copies of each token, and its backward is a gather with the
inverse; the gradient of a bias is a sum over rows that lie together already.
"""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import grouped as casts
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

    def sorted(self, values: torch.Tensor) -> torch.Tensor:
        """[tokens * k, ...] in the order of visits -> sorted by expert."""
        return _Permute.apply(values, self.order, self.back)

    def returned(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert -> in the order of visits."""
        return _Permute.apply(rows, self.back, self.order)


def biased(rows: torch.Tensor, bias: torch.Tensor, groups: Groups) -> torch.Tensor:
    """rows [S, N] sorted by expert, plus the bias [E, N] of each one's expert."""
    return _Bias.apply(rows, bias, groups)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, visits: Visits) -> torch.Tensor:  # type: ignore[override]
        ctx.visits = visits
        return tokens[visits.order // visits.each]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        visits = ctx.visits
        return grad[visits.back].view(-1, visits.each, grad.shape[-1]).sum(1), None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.inverse = inverse
        return values[index]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return grad[ctx.inverse], None, None


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, bias: torch.Tensor, groups: Groups) -> torch.Tensor:  # type: ignore[override]
        ctx.groups, ctx.dtype = groups, bias.dtype
        return casts.add_rows(rows.contiguous(), bias.detach().contiguous(), groups.table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        return grad, casts.sum_rows(grad.contiguous(), ctx.groups.table).to(ctx.dtype), None
