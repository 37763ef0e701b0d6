"""`AdamStep`: everything that one pass of Adam over a flat partition reads and writes.

A pass reads quantized values, computes in fp32 (ds_fp8/numerics/adam.py has every operation) and writes quantized
values back, 128 elements at a time, so no fp32 tensor of the partition's size exists. `reference_step` is that pass in
PyTorch, in chunks of 65,536 elements; the C++ and Triton passes are its counterparts, bit for bit with nearest and with
stochastic rounding.

    for each block of 128 elements
        g = float(grad) * grad_scale
        w = master (numerics/masters.py);  m, v = states (numerics/states.py)
        update                             (numerics/adam.py);  r = sqrt(v) of the new v
        store v or r (a nonzero r never as code zero), then m or m over the r just stored, then master and param
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import BLOCK_SIZE
from ..levels import STATE_FORMATS
from ..numerics import masters, states
from ..numerics.adam import AdamScalars, update
from ..numerics.masters import MasterStorage
from ..numerics.random_bits import ADAM_STREAM, EXP_AVG_SHIFT, EXP_AVG_SQ_SHIFT, MASTER_SHIFT, Stochastic
from ..numerics.states import StateStorage

CHUNK_NUMEL = 512 * BLOCK_SIZE
"""Elements that the reference handles at once: 256 KiB for each fp32 temporary."""


@dataclass
class AdamStep:
    """One step of one flat partition of n elements; all tensors on one device, contiguous, one-dimensional.

    param             [n] fp32, bf16 or fp16, updated in place: the 16-bit weight, or an fp32 parameter that is its own
                      master
    grad              [n] fp32, bf16 or fp16, read only
    exp_avg           StateStorage, updated in place; holds m over the root of exp_avg_sq if its format is in
                      RATIO_FORMATS
    exp_avg_sq        StateStorage, updated in place; holds sqrt(v) if its format is in ROOT_FORMATS
    master            MasterStorage, updated in place
    lr ... eps        Python numbers, as torch.optim.Adam means them
    decoupled         True: AdamW's decay; False: Adam's L2 term
    step              number of this step, 1 is the first
    bias_correction   False leaves both corrections out (an option of DeepSpeed's Adam)
    grad_scale        multiplies the gradient in fp32: unscale and clip; a float, or a 0-d fp32 tensor on the same
                      device
    rounding          `nearest` | `stochastic`, for the quantized values of states and master (never for fp32 and
                      split32)
    seed              of the stochastic rounding, with `step` and the element's number its whole state
    torch_sqrt        True: the very square root of torch.optim.Adam, see numerics/adam.py; on a CPU where it is not the
                      rounded one, C++ calls it in torch's library (kernels/cpu/torch_sqrt.py), or PyTorch does the step

    Stochastic: stream 1, index = element number in the partition; shifts of the word in numerics/random_bits.py.
    """

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: StateStorage
    exp_avg_sq: StateStorage
    master: MasterStorage
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    step: int
    bias_correction: bool = True
    grad_scale: float | torch.Tensor = 1.0
    rounding: str = "nearest"
    seed: int = 0
    torch_sqrt: bool = False

    def __post_init__(self) -> None:
        assert self.exp_avg_sq.format in STATE_FORMATS, "int8 holds exp_avg alone"

    @property
    def scalars(self) -> AdamScalars:
        """The derived numbers, as doubles."""
        return AdamScalars.at(
            lr=self.lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled=self.decoupled,
            step=self.step,
            bias_correction=self.bias_correction,
        )

    def source(self, shift: int, first: int = 0) -> Stochastic | None:
        """The random bits of one use (its shift, see numerics/random_bits.py), None when rounding is to nearest."""
        if self.rounding != "stochastic":
            return None
        return Stochastic(self.seed, self.step, ADAM_STREAM, first, shift)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the step, for a look at devices and strides."""
        found = [self.param, self.grad, *self.exp_avg.tensors().values(), *self.exp_avg_sq.tensors().values()]
        found += self.master.tensors().values()
        return found


@torch.no_grad()
def reference_step(step: AdamStep) -> None:
    """The whole pass in PyTorch, chunk by chunk."""
    scalars = step.scalars
    numel = step.param.numel()
    for start in range(0, numel, CHUNK_NUMEL):
        _step_chunk(step, scalars, start, min(start + CHUNK_NUMEL, numel))


def _step_chunk(step: AdamStep, scalars: AdamScalars, start: int, stop: int) -> None:
    param, master = step.param[start:stop], step.master.chunk(start, stop)
    exp_avg, exp_avg_sq = step.exp_avg.chunk(start, stop), step.exp_avg_sq.chunk(start, stop)

    grad = step.grad[start:stop].float() * step.grad_scale
    weight = masters.read(master, param)
    m, v = states.read_exp_avg(exp_avg, exp_avg_sq), states.read_exp_avg_sq(exp_avg_sq)
    divides = step.exp_avg_sq.format == "fp32"
    root = update(weight, grad, m, v, scalars, torch_sqrt=step.torch_sqrt, divides=divides)

    states.write_exp_avg_sq(exp_avg_sq, v, root, step.source(EXP_AVG_SQ_SHIFT, start))
    states.write_exp_avg(exp_avg, exp_avg_sq, m, step.source(EXP_AVG_SHIFT, start))
    masters.write(master, param, weight, step.source(MASTER_SHIFT, start))
