"""A backward for many gradients at once, one after the other.

`torch.autograd.grad(..., is_grads_batched=True)`, `autograd.functional.jacobian(..., vectorize=True)` and
`torch.func.vmap` around `autograd.grad` hand a backward one tensor that stands for a batch of gradients: its batch axis
is hidden, and operators that have a rule for it never see that axis. A cast to FP8 has no such rule, since its scale
and amax belong to one gradient. So the batch is unfolded here, and each gradient takes the backward that it would take
alone, to the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

Gradients = tuple[torch.Tensor | None, ...]


def one_by_one(backward: Callable[[Any, torch.Tensor], Gradients]) -> Callable[[Any, torch.Tensor], Gradients]:
    """`backward(ctx, grad_output)` of an autograd.Function, for a batch of grad_outputs too."""

    @functools.wraps(backward)
    def run(ctx: Any, grad_output: torch.Tensor) -> Gradients:
        if _functorch.is_legacy_batchedtensor(grad_output):  # is_grads_batched
            level = max(torch._C._vmapmode_increment_nesting() - 1, 1)  # 1 in autograd's own threads, which have none
            torch._C._vmapmode_decrement_nesting()
            found = _each(run, ctx, torch._remove_batch_dim(grad_output, level, 0, 0))
            return tuple(None if one is None else torch._add_batch_dim(one, 0, level) for one in found)
        if _functorch.is_batchedtensor(grad_output):
            interpreter = retrieve_current_functorch_interpreter()
            level = _functorch.maybe_get_level(grad_output)
            with interpreter.lower():
                if level != interpreter.level():  # batched by a transform further out
                    return run(ctx, grad_output)
                batch = _functorch.get_unwrapped(grad_output).movedim(_functorch.maybe_get_bdim(grad_output), 0)
                found = _each(run, ctx, batch)
            return tuple(None if one is None else _functorch._add_batch_dim(one, 0, level) for one in found)
        return backward(ctx, grad_output)

    return run


def _each(run: Callable[[Any, torch.Tensor], Gradients], ctx: Any, batch: torch.Tensor) -> Gradients:
    """Gradients [B, ...] for `batch` [B, ...]; None where a backward gives none."""
    found = [run(ctx, one) for one in batch.unbind(0)]
    return tuple(None if of_one[0] is None else torch.stack(of_one) for of_one in zip(*found, strict=True))
