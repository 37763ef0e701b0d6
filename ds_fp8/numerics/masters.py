"""Masters: the 16-bit weight that ZeRO holds anyway, plus the bits it lacks.

A training step changes a weight by less than half a unit of bf16 most of the time, so somebody must remember the rest.
An fp32 master keeps it twice: the upper half is the 16-bit weight again. Keeping only the *remainder* saves that half.

    format     base   extra data      what is kept
    fp32       any    fp32 [n]        the master itself; weight = RNE(master)
    split32    bf16   int16 [n]       fp32, exactly
    split24    bf16   int8  [n]       the upper 24 bits of fp32
    split32    fp16   int16 [n]       weight + remainder * ulp(weight) * 2^-15: fp32 exactly from 2^-16 up
    split24    fp16   int8  [n]       weight + remainder * ulp(weight) * 2^-7
    fp16       any    fp16 [n] + scale_inv [blocks]     the master in scaled fp16 (blocks16); weight = RNE(its value)
    own        fp32   -               an fp32 parameter is its own master, whatever the level says

bf16 is the upper half of fp32, so with `bits` the pattern of the master (uint32, NaN made 0x7fc00000):

    split32: weight = (bits + 0x8000) >> 16;                   remainder = bits - (weight << 16)     in [-32768, 32767]
    split24: bits24 = (bits + 0x80) >> 8      stochastic: (bits + (random >> 24)) >> 8
             weight = (bits24 + 0x80) >> 8;                    remainder = bits24 - (weight << 8)    in [-128, 127]
    join:    bits = (weight << 16) + remainder   or   ((weight << 8) + remainder) << 8;  if that is NaN: weight << 16

all in wrapping 32-bit integers. Both are rounded half up (away from zero): with ties to even a remainder of 16 bits
would need 65537 values, and one of 8 bits three more operations. A join is NaN without a NaN weight only where somebody
has written a weight in place: zero (pruning, a mask) beside the negative remainder of what was there. The weight
differs from RNE for one master in 2^17. For fp16, weight = RNE(master), q = (master - weight) / (ulp * 2^-k), exact in
fp32, remainder = RNE(q) or floor(q + float(random >> 8) * 2^-24); join is weight + float(remainder) * unit, product
exact, one fp32 sum. ulp(weight) = 2^(max(E, 1) - 25) with E the exponent field of the fp16 pattern. A weight that is
not finite has remainder 0. split rounding is RNE unless `Stochastic` (then split24 and fp16 only; split32 is never
rounded randomly).
Source: split fp32 as in bf16 optimizers (Zamirai et al., arXiv 2010.06192, and TE's remainders); the fp16 form is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..formats import BLOCK_SIZE
from ..levels import OWN
from . import blocks16, flat
from .random_bits import Stochastic, power_of_two

_FP16_SHIFT = {torch.int16: 15, torch.int8: 7}
_CANONICAL_NAN = 0x7FC00000


@dataclass
class MasterStorage:
    """What is kept beside the parameter of a flat partition, or a chunk of it.

    format     OWN or one of MASTER_FORMATS
    data       [n] as in the table above; None for OWN
    scale_inv  fp32 [ceil(n / 128)] for `fp16`, else None
    """

    format: str
    data: torch.Tensor | None = None
    scale_inv: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by field name, in a fixed order."""
        fields = {"data": self.data, "scale_inv": self.scale_inv}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def chunk(self, start: int, stop: int) -> MasterStorage:
        """Views of elements [start, stop); `start` is a multiple of 128."""
        blocks = slice(start // BLOCK_SIZE, flat.blocks_of(stop))
        return MasterStorage(
            self.format,
            None if self.data is None else self.data[start:stop],
            None if self.scale_inv is None else self.scale_inv[blocks],
        )


@dataclass(frozen=True)
class MasterCodec:
    """How one format of masters lies in memory, and its way to fp32 and back.

    fields  the tensors of MasterStorage that it has
    new     flat param [n] -> these tensors, for a master that equals it
    read    (storage, param) -> the master, fp32 [n]; it may be the storage's own tensor, or the parameter's
    write   (storage, param, fp32 values [n], rounding or None): store the master in place and, from what it now holds,
            the parameter
    """

    fields: tuple[str, ...]
    new: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    read: Callable[[MasterStorage, torch.Tensor], torch.Tensor]
    write: Callable[[MasterStorage, torch.Tensor, torch.Tensor, Stochastic | None], None]


def new_master(format: str, param: torch.Tensor) -> MasterStorage:  # noqa: A002 (the field's name)
    """The master of a flat `param` [n], equal to it: a fresh remainder is zero."""
    if format not in CODECS:
        raise ValueError(f"master format {format!r} is not one of {', '.join(name for name in CODECS if name != OWN)}")
    if param.dtype == torch.float32:
        format = OWN  # noqa: A001
    codec = CODECS[format]
    return MasterStorage(format, **dict(zip(codec.fields, codec.new(param.detach()), strict=True)))


def read(master: MasterStorage, param: torch.Tensor) -> torch.Tensor:
    """The master as fp32 [n]; the parameter's or master's own storage for OWN and `fp32`, else fresh."""
    return CODECS[master.format].read(master, param.detach())


def write(master: MasterStorage, param: torch.Tensor, values: torch.Tensor, rounding: Stochastic | None = None) -> None:
    """Store fp32 `values` [n] in place: the master and, from what it now holds, the parameter."""
    CODECS[master.format].write(master, param.detach(), values, rounding)


def data_of(master: MasterStorage) -> torch.Tensor:
    """`data` of a format that has it."""
    assert master.data is not None
    return master.data


def _write_own(master: MasterStorage, param: torch.Tensor, values: torch.Tensor, rounding: Stochastic | None) -> None:
    param.copy_(values)


def _write_fp32(master: MasterStorage, param: torch.Tensor, values: torch.Tensor, rounding: Stochastic | None) -> None:
    data_of(master).copy_(values)
    param.copy_(values)


def _read_fp16(master: MasterStorage, param: torch.Tensor) -> torch.Tensor:
    assert master.scale_inv is not None
    return blocks16.decode(data_of(master), master.scale_inv)


def _write_fp16(master: MasterStorage, param: torch.Tensor, values: torch.Tensor, rounding: Stochastic | None) -> None:
    assert master.scale_inv is not None
    quantized, scale_inv = blocks16.encode(values, rounding=rounding)
    data_of(master).copy_(quantized)
    master.scale_inv.copy_(scale_inv)
    param.copy_(blocks16.decode(quantized, scale_inv))


def _new_split(remainder: torch.dtype, param: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.zeros(param.numel(), dtype=remainder, device=param.device),)


def _read_split(master: MasterStorage, param: torch.Tensor) -> torch.Tensor:
    return join(param, data_of(master))


def _write_split(master: MasterStorage, param: torch.Tensor, values: torch.Tensor, rounding: Stochastic | None) -> None:
    data = data_of(master)
    weight, remainder = split(values, param.dtype, data.dtype, rounding)
    param.copy_(weight)
    data.copy_(remainder)


def _split(remainder: torch.dtype) -> MasterCodec:
    return MasterCodec(("data",), partial(_new_split, remainder), _read_split, _write_split)


CODECS = {
    OWN: MasterCodec((), lambda param: (), lambda master, param: param, _write_own),
    "fp32": MasterCodec(("data",), lambda param: (param.float(),), lambda master, param: data_of(master), _write_fp32),
    "split32": _split(torch.int16),
    "split24": _split(torch.int8),
    "fp16": MasterCodec(("data", "scale_inv"), lambda p: blocks16.encode(p.float()), _read_fp16, _write_fp16),
}
"""Every format of a master, and the parameter that is its own; a format of `levels.MASTERS` has an entry here."""


def split(
    master: torch.Tensor, base: torch.dtype, remainder_dtype: torch.dtype, rounding: Stochastic | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [n] as (weight in `base`, remainder in int16 or int8); `base` is bfloat16 or float16."""
    if base == torch.bfloat16:
        return _split_bf16(master, remainder_dtype, rounding)
    if base == torch.float16:
        return _split_fp16(master, remainder_dtype, rounding)
    raise ValueError(f"a split master needs a bf16 or fp16 parameter, not {base}")


def join(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The inverse of `split`: fp32 [n]."""
    extra = remainder.to(torch.int32)
    if weight.dtype == torch.bfloat16:
        high = weight.view(torch.int16).to(torch.int32) << 16
        joined = high + (extra if remainder.dtype == torch.int16 else extra << 8)
        return torch.where(joined.view(torch.float32).isnan(), high, joined).view(torch.float32)
    if weight.dtype == torch.float16:
        return weight.float() + extra.float() * _fp16_unit(weight, remainder.dtype)
    raise ValueError(f"a split master needs a bf16 or fp16 parameter, not {weight.dtype}")


def _split_bf16(
    master: torch.Tensor, remainder_dtype: torch.dtype, rounding: Stochastic | None
) -> tuple[torch.Tensor, torch.Tensor]:
    bits = master.contiguous().view(torch.int32)
    bits = torch.where(master.isnan(), torch.full_like(bits, _CANONICAL_NAN), bits)
    # Signed words: sums wrap and shifts keep the sign, so the low 16 bits that stay are those of uint32 arithmetic.
    if remainder_dtype == torch.int16:
        high = bits + 0x8000 >> 16
        remainder = bits - (high << 16)
    else:
        if rounding is None:
            carry = torch.full_like(bits, 0x80)
        else:
            carry = (rounding.bits(bits.numel(), bits.device) >> 24).to(torch.int32)
        bits24 = bits + torch.where(master.isfinite(), carry, torch.zeros_like(bits)) >> 8
        high = bits24 + 0x80 >> 8
        remainder = bits24 - (high << 8)
    return high.to(torch.int16).view(torch.bfloat16), remainder.to(remainder_dtype)


def _split_fp16(
    master: torch.Tensor, remainder_dtype: torch.dtype, rounding: Stochastic | None
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = master.to(torch.float16)
    quotient = (master - weight.float()) * torch.reciprocal(_fp16_unit(weight, remainder_dtype))
    if rounding is None or remainder_dtype == torch.int16:
        remainder = torch.round(quotient)
    else:
        random = rounding.bits(master.numel(), master.device)
        remainder = torch.floor(quotient + (random >> 8).float() * 2.0**-24)
    return weight, torch.where(weight.isfinite(), remainder, torch.zeros_like(remainder)).to(remainder_dtype)


def _fp16_unit(weight: torch.Tensor, remainder_dtype: torch.dtype) -> torch.Tensor:
    """ulp(weight) * 2^-k: what one step of the remainder means."""
    field = weight.view(torch.int16).to(torch.int32) >> 10 & 0x1F
    return power_of_two(field.clamp(min=1) - 25 - _FP16_SHIFT[remainder_dtype])
