"""A small training job on given gradients: the same for every optimizer under test."""

from __future__ import annotations

import torch

SHAPES = ((40, 33), (33,), (7,), (256,), (0,))
"""Not multiples of 128, shorter than one block, exactly two blocks, and a partition of a rank that owns nothing."""


def parameters(dtype=torch.float32, seed=0):
    """Weights N(0, .1) in `dtype`; equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in SHAPES]


def gradients(step, dtype=torch.float32, spread=1.0):
    """Heavy-tailed gradients of step `step`, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(1000 + step)
    found = []
    for shape in SHAPES:
        tail = torch.exp(spread * torch.randn(shape, generator=generator))
        found.append((torch.randn(shape, generator=generator) * tail * 1e-2).to(dtype))
    return found


def train(optimizer, params, first, last, spread=1.0):
    """Steps first..last (1 is the first) on the gradients above."""
    for step in range(first, last + 1):
        for param, grad in zip(params, gradients(step, params[0].dtype, spread), strict=True):
            param.grad = grad
        optimizer.step()


def train_fp32_reference(optimizer, params, first, last, dtype, spread=1.0):
    """The same gradients, rounded to `dtype` and given to an fp32 optimizer."""
    for step in range(first, last + 1):
        for param, grad in zip(params, gradients(step, dtype, spread), strict=True):
            param.grad = grad.float()
        optimizer.step()
