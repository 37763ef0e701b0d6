"""The fused optimizer step on the CPU: one pass over memory for every combination of formats.

Counterpart of `ds_fp8.kernels.adam.reference_step`, bit for bit, stochastic rounding included.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...numerics import expansion
from ...numerics.adam import torch_sqrt_is_ieee
from ...numerics.flat import blocks_of
from ...numerics.masters import MasterStorage
from ...numerics.random_bits import EXP_AVG_SHIFT
from ...numerics.states import StateStorage
from . import jobs, torch_sqrt
from .casts import run

if TYPE_CHECKING:
    from ..adam import AdamStep

GRAIN_BLOCKS = 128
"""Blocks that are worth a thread: 16K parameters, some ten microseconds of a step."""


def adam_step(step: AdamStep) -> Any:
    """Update param, states and master in place; NotImplemented for what only PyTorch handles: other dtypes, a root
    of its own.
    """
    gradient_dtype = jobs.DTYPES.get(step.grad.dtype)
    if gradient_dtype is None or step.param.dtype not in jobs.DTYPES:
        return NotImplemented
    scale = step.grad_scale
    scale = (
        scale.detach().float() if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float32, device="cpu")
    )
    sqrt = None if not step.torch_sqrt or torch_sqrt_is_ieee() else torch_sqrt.entry()
    if sqrt is None and step.torch_sqrt and not torch_sqrt_is_ieee():
        return NotImplemented
    scalars = step.scalars
    source = step.source(EXP_AVG_SHIFT)
    key = 0 if source is None else source.key
    job = jobs.AdamJob(
        step.param.data_ptr(),
        step.grad.data_ptr(),
        scale.data_ptr(),
        _state(step.exp_avg, key),
        _state(step.exp_avg_sq, key),
        _master(step.master, key),
        _table().data_ptr() if "e4m3_expanded" in (step.exp_avg.format, step.exp_avg_sq.format) else None,
        sqrt,
        torch_sqrt.MODE,
        step.param.numel(),
        jobs.DTYPES[step.param.dtype],
        gradient_dtype,
        step.rounding == "stochastic",
        *(getattr(scalars, name) for name in jobs.ADAM_SCALARS),
        step.exp_avg_sq.format == "fp32",
    )
    run(jobs.ADAM, job, blocks_of(step.param.numel()), GRAIN_BLOCKS)
    return None


def _state(state: StateStorage, key: int) -> jobs.State:
    return jobs.State(
        state.data.data_ptr(),
        jobs.address(state.scale_inv),
        jobs.address(state.expansion),
        jobs.STATE_FORMATS[state.format],
        key,
    )


def _master(master: MasterStorage, key: int) -> jobs.State:
    number = jobs.MASTER_FORMATS[master.format]
    return jobs.State(jobs.address(master.data), jobs.address(master.scale_inv), None, number, key)


@lru_cache(maxsize=1)
def _table() -> Tensor:
    """What each code of an expanded block decodes to, made once by the reference."""
    return expansion.table("cpu").contiguous()
