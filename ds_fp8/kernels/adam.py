"""`AdamStep`: everything that one pass of Adam over a flat partition reads and writes.

A pass reads quantized values, computes in fp32 (ds_fp8/numerics/adam.py has every operation) and writes quantized
values back, 128 elements at a time, so no fp32 tensor of the partition's size exists. `reference_step` is that pass in
PyTorch, in chunks of 65,536 elements; the C++ and Triton passes are its counterparts, bit for bit with nearest and with
stochastic rounding.

    for each block of 128 elements
        g = float(grad) * grad_scale            (a coded gradient: code * scale_inv first)
        w = master (numerics/masters.py);  m, v = states (numerics/states.py)
        update                             (numerics/adam.py);  r = sqrt(v) of the new v
        store v or r (a nonzero r never as code zero), then m or m over the r just stored, then master and param
        weight16 = RNE(float32 of what the master now holds); quantized_weight from param or weight16
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import BLOCK_SIZE, E4M3, Format
from ..levels import STATE_FORMATS
from ..numerics import cast, flat, masters, states
from ..numerics.adam import AdamScalars, update
from ..numerics.masters import MasterStorage
from ..numerics.random_bits import ADAM_STREAM, EXP_AVG_SHIFT, EXP_AVG_SQ_SHIFT, MASTER_SHIFT, Stochastic
from ..numerics.states import StateStorage

CHUNK_NUMEL = 512 * BLOCK_SIZE
"""Elements that the reference handles at once: 256 KiB for each fp32 temporary."""


@dataclass
class QuantizedWeight:
    """FP8 weights to make in the same pass, for parameters whose scale is known beforehand (delayed scaling).

    quantized  uint8 [n], as long as the partition; only the segments are written
    segments   (start, stop) element ranges, one per parameter fragment, ascending, not overlapping
    scale      fp32 [segments]
    amax       fp32 [segments], written: amax of the 16-bit weight of the segment (infinity if not finite)
    fmt        format of the quantized values
    """

    quantized: torch.Tensor
    segments: tuple[tuple[int, int], ...]
    scale: torch.Tensor
    amax: torch.Tensor
    fmt: Format = E4M3


@dataclass
class AdamStep:
    """One step of one flat partition of n elements; all tensors on one device, contiguous, one-dimensional.

    param             [n] fp32, bf16 or fp16, updated in place: the 16-bit weight, or an fp32 parameter that is its own
                      master
    grad              [n] fp32, bf16 or fp16, read only; or uint8 values of `grad_fmt` in blocks of 128
                      (numerics/flat.py)
    grad_scale_inv    fp32 [ceil(n / 128)] if the gradient is coded, else None
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
    rounding          `nearest` | `stochastic`, for the quantized values of states and master (never for fp32, split32 and weights)
    seed              of the stochastic rounding, with `step` and the element's number its whole state
    torch_sqrt        True: the very square root of torch.optim.Adam, see numerics/adam.py; on a CPU where it is not the
                      rounded one, C++ calls it in torch's library (kernels/cpu/torch_sqrt.py), or PyTorch does the step
    weight16          optional bf16 or fp16 [n], written: RNE of the new master (for an fp32 `param`)
    quantized_weight  optional QuantizedWeight, written from weight16 if given, else from param

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
    weight16: torch.Tensor | None = None
    quantized_weight: QuantizedWeight | None = None
    grad_scale_inv: torch.Tensor | None = None
    grad_fmt: Format = E4M3

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

    def gradient(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the gradient in fp32, as they came; `start` is a multiple of 128."""
        if self.grad_scale_inv is None:
            return self.grad[start:stop].float()
        blocks = slice(start // BLOCK_SIZE, flat.blocks_of(stop))
        return flat.decode(self.grad[start:stop], self.grad_scale_inv[blocks], self.grad_fmt)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the step, for a look at devices and strides."""
        found = [self.param, self.grad, *self.exp_avg.tensors().values(), *self.exp_avg_sq.tensors().values()]
        found += self.master.tensors().values()
        found += [one for one in (self.weight16, self.grad_scale_inv) if one is not None]
        if self.quantized_weight is not None:
            found += [self.quantized_weight.quantized, self.quantized_weight.scale, self.quantized_weight.amax]
        return found


@torch.no_grad()
def reference_step(step: AdamStep) -> None:
    """The whole pass in PyTorch, chunk by chunk."""
    scalars = step.scalars
    numel = step.param.numel()
    for start in range(0, numel, CHUNK_NUMEL):
        _step_chunk(step, scalars, start, min(start + CHUNK_NUMEL, numel))
    if step.quantized_weight is not None:
        write_quantized_weight(step)


def _step_chunk(step: AdamStep, scalars: AdamScalars, start: int, stop: int) -> None:
    param, master = step.param[start:stop], step.master.chunk(start, stop)
    exp_avg, exp_avg_sq = step.exp_avg.chunk(start, stop), step.exp_avg_sq.chunk(start, stop)

    grad = step.gradient(start, stop) * step.grad_scale
    weight = masters.read(master, param)
    m, v = states.read_exp_avg(exp_avg, exp_avg_sq), states.read_exp_avg_sq(exp_avg_sq)
    divides = step.exp_avg_sq.format == "fp32"
    root = update(weight, grad, m, v, scalars, torch_sqrt=step.torch_sqrt, divides=divides)

    states.write_exp_avg_sq(exp_avg_sq, v, root, step.source(EXP_AVG_SQ_SHIFT, start))
    states.write_exp_avg(exp_avg, exp_avg_sq, m, step.source(EXP_AVG_SHIFT, start))
    masters.write(master, param, weight, step.source(MASTER_SHIFT, start))
    if step.weight16 is not None:
        step.weight16[start:stop].copy_(masters.read(master, param))


def write_quantized_weight(step: AdamStep) -> None:
    """FP8 values and amaxes of the new 16-bit weight, segment by segment, as an FP8 layer would make them."""
    wanted = step.quantized_weight
    assert wanted is not None
    weight = step.param if step.weight16 is None else step.weight16
    for number, (start, stop) in enumerate(wanted.segments):
        chunk = weight[start:stop]
        wanted.amax[number] = cast.amax(chunk)
        quantized = cast.quantize(chunk, wanted.scale[number], wanted.fmt)
        wanted.quantized[start:stop].copy_(quantized.view(torch.uint8))
