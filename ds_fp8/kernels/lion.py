"""`LionStep`: everything that one pass of Lion over a flat partition reads and writes.

As `AdamStep`, with one state: for each block of 128 elements

    g = float(grad) * grad_scale
    w = master (numerics/masters.py);  m = exp_avg (numerics/states.py), which no format keeps as a ratio here
    update (numerics/lion.py)
    store m, then master and param

There is no C++ and no Triton kernel of it yet: `reference_lion_step` is what runs, in chunks of 65,536 elements, and
`dispatch` says so once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics import masters, states
from ..numerics.lion import LionScalars, update
from ..numerics.masters import MasterStorage
from ..numerics.random_bits import ADAM_STREAM, EXP_AVG_SHIFT, MASTER_SHIFT, Stochastic
from ..numerics.states import StateStorage
from .adam import CHUNK_NUMEL


@dataclass
class LionStep:
    """One step of one flat partition of n elements; all tensors on one device, contiguous, one-dimensional.

    param       [n] fp32, bf16 or fp16, updated in place
    grad        [n] fp32, bf16 or fp16, read only
    exp_avg     StateStorage, updated in place; holds m itself in every format
    master      MasterStorage, updated in place
    grad_scale  multiplies the gradient in fp32; a float, or a 0-d fp32 tensor on the same device
    rounding    `nearest` | `stochastic`, of state and master; `seed` and `step` decide its bits, as in AdamStep
    """

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: StateStorage
    master: MasterStorage
    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    step: int
    grad_scale: float | torch.Tensor = 1.0
    rounding: str = "nearest"
    seed: int = 0

    def source(self, shift: int, first: int = 0) -> Stochastic | None:
        """The random bits of one use, None when rounding is to nearest."""
        if self.rounding != "stochastic":
            return None
        return Stochastic(self.seed, self.step, ADAM_STREAM, first, shift)


@torch.no_grad()
def reference_lion_step(step: LionStep) -> None:
    """The whole pass in PyTorch, chunk by chunk."""
    scalars = LionScalars.at(lr=step.lr, beta1=step.beta1, beta2=step.beta2, weight_decay=step.weight_decay)
    numel = step.param.numel()
    for start in range(0, numel, CHUNK_NUMEL):
        stop = min(start + CHUNK_NUMEL, numel)
        param, master = step.param[start:stop], step.master.chunk(start, stop)
        exp_avg = step.exp_avg.chunk(start, stop)
        weight, m = masters.read(master, param), states.read_exp_avg(exp_avg, None)
        update(weight, step.grad[start:stop].float() * step.grad_scale, m, scalars)
        states.write_exp_avg(exp_avg, None, m, step.source(EXP_AVG_SHIFT, start))
        masters.write(master, param, weight, step.source(MASTER_SHIFT, start))
