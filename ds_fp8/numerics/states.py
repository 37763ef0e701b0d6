"""How exp_avg and exp_avg_sq lie in memory: one `StateStorage` holds either, in one of six formats.

    format         data            scale_inv  expansion  exp_avg    exp_avg_sq    bytes per parameter
    fp32           fp32 [n]        -          -          m          v             4
    bf16           bf16 [n]        -          -          m          v             2
    fp16           fp16 [n]        blocks     -          m          sqrt(v)       2.03     blocks16
    int8           int8 [n]        blocks     -          m / d      refused       1.03     blocks8
    e4m3           uint8 [n]       blocks     -          m / d      sqrt(v)       1.03     flat
    e4m3_expanded  uint8 [n]       blocks     blocks     m / d      sqrt(v)       1.04     expansion

sqrt(v) needs half the exponents of v: v itself underflows where gradients are small. The square root is computed
anyway, and v is decoded as r * r. A *zero* code beside a nonzero sqrt(v) would divide by eps alone and blow the
parameter up, so it becomes the smallest code (0x01, in fp16 its smallest subnormal): the update is then too small,
never too large.

Eight bits reach over a block only if its elements are of one size. Moments are not, where gradients differ by decades;
m / sqrt(v) is, everywhere: it is the update. So exp_avg in 8 bits is kept as a ratio, and exp_avg_sq is stored first:

    r = what exp_avg_sq will read as sqrt(v): its decoded code; in fp32 and bf16 the rounded root of the stored v
    d = r where r != 0, else 1
    stored is m / d (one fp32 division), read is decoded * d (one product)

The divisor is what the next step reads, to the bit, so an error of sqrt(v) does not reach m. Where v is zero (a new
state, a v below fp32) m stands there itself and is not lost; NaN stays NaN. What exp_avg means depends on exp_avg_sq:
whoever writes the latter writes the former again, after it. int8 suits the ratio alone: a root spans more than its
values.

The functions are elementwise over blocks; a chunk that starts at a multiple of 128 gives the same quantized values as
the whole. Rounding: RNE, or `Stochastic` for every format but fp32.
Source: MS-AMP keeps v in tensor-scaled fp16; docs/numerics.md shows what that costs, why we keep the root and the
ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..formats import BLOCK_SIZE, E4M3
from ..levels import STATES
from . import blocks8, blocks16, expansion, flat
from .adam import ieee_sqrt
from .random_bits import Stochastic

ROOT_FORMATS = frozenset(name for name, fmt in STATES.items() if fmt.keeps_root)
"""Formats in which exp_avg_sq is kept as its square root."""

RATIO_FORMATS = frozenset(name for name, fmt in STATES.items() if fmt.keeps_ratio)
"""Formats in which exp_avg is kept as its ratio to the root of exp_avg_sq."""


@dataclass
class StateStorage:
    """One optimizer state of a flat partition, or a chunk of it; the tensors belong to whoever made them.

    format      one of EXP_AVG_FORMATS
    data        [n], dtype as in the table above
    scale_inv   fp32 [ceil(n / 128)] or None
    expansion   uint8 [ceil(n / 128)], sixteenths of k, or None
    """

    format: str
    data: torch.Tensor
    scale_inv: torch.Tensor | None = None
    expansion: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by field name, in a fixed order."""
        fields = {"data": self.data, "scale_inv": self.scale_inv, "expansion": self.expansion}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def chunk(self, start: int, stop: int) -> StateStorage:
        """Views of elements [start, stop); `start` is a multiple of 128."""
        blocks = slice(start // BLOCK_SIZE, flat.blocks_of(stop))
        return StateStorage(
            self.format,
            self.data[start:stop],
            None if self.scale_inv is None else self.scale_inv[blocks],
            None if self.expansion is None else self.expansion[blocks],
        )


@dataclass(frozen=True)
class Codec:
    """How one format lies in memory, and its way to fp32 and back.

    dtype   of `data`
    fields  the tensors of StateStorage that it has
    read    storage -> what is stored, fp32 [n]; the caller may overwrite the result unless it is in fp32
    write   (storage, fp32 values [n], rounding or None): store them in place as they are
    """

    dtype: torch.dtype
    fields: tuple[str, ...]
    read: Callable[[StateStorage], torch.Tensor]
    write: Callable[[StateStorage, torch.Tensor, Stochastic | None], None]


def new_state(format: str, numel: int, device: torch.device | str) -> StateStorage:  # noqa: A002 (the field's name)
    """Buffers of a state that decodes to zeros."""
    if format not in CODECS:
        raise ValueError(f"state format {format!r} is not one of {', '.join(CODECS)}")
    codec, blocks = CODECS[format], flat.blocks_of(numel)
    return StateStorage(
        format,
        torch.zeros(numel, dtype=codec.dtype, device=device),
        torch.full((blocks,), flat.SMALLEST_SCALE_INV, dtype=torch.float32, device=device)
        if "scale_inv" in codec.fields
        else None,
        torch.full((blocks,), expansion.MAX_EXPANSION, dtype=torch.uint8, device=device)
        if "expansion" in codec.fields
        else None,
    )


def read(state: StateStorage) -> torch.Tensor:
    """What is stored, as fp32 [n]: m or m / d, v or sqrt(v). The caller may overwrite the result unless in fp32."""
    return CODECS[state.format].read(state)


def write(state: StateStorage, values: torch.Tensor, rounding: Stochastic | None = None) -> None:
    """Store fp32 `values` [n] in place as they are. Zeros of nonzero values stay zero; see `write_root`."""
    CODECS[state.format].write(state, values, rounding)


def read_root(exp_avg_sq: StateStorage) -> torch.Tensor:
    """r, fp32 [n]: the sqrt(v) that is stored, or the root of the v that is."""
    stored = read(exp_avg_sq)
    return stored if exp_avg_sq.format in ROOT_FORMATS else ieee_sqrt(stored)


def read_exp_avg(exp_avg: StateStorage, exp_avg_sq: StateStorage | None) -> torch.Tensor:
    """m as fp32 [n]; `exp_avg_sq` is read only where exp_avg is a ratio."""
    stored = read(exp_avg)
    if exp_avg_sq is None or exp_avg.format not in RATIO_FORMATS:
        return stored
    return stored * _divisor(read_root(exp_avg_sq))


def read_exp_avg_sq(exp_avg_sq: StateStorage) -> torch.Tensor:
    """v as fp32 [n]: r * r where the root is stored."""
    stored = read(exp_avg_sq)
    return stored * stored if exp_avg_sq.format in ROOT_FORMATS else stored


def _divisor(root: torch.Tensor) -> torch.Tensor:
    """d of the module docstring."""
    return torch.where(root == 0, torch.ones_like(root), root)


def write_root(state: StateStorage, root: torch.Tensor, rounding: Stochastic | None = None) -> None:
    """Store sqrt(v) >= 0, fp32 [n], in place; a zero code of a nonzero root becomes the smallest code."""
    write(state, root, rounding)
    bits = state.data.view(torch.int16) if state.data.dtype == torch.float16 else state.data
    bits.masked_fill_((bits == 0) & (root > 0), 1)


def write_exp_avg_sq(
    exp_avg_sq: StateStorage, v: torch.Tensor, root: torch.Tensor, rounding: Stochastic | None = None
) -> None:
    """Store v [n] fp32 in place; `root` is its square root, which some formats store instead."""
    assert STATES[exp_avg_sq.format].holds_exp_avg_sq, f"{exp_avg_sq.format} holds exp_avg alone"
    if exp_avg_sq.format in ROOT_FORMATS:
        write_root(exp_avg_sq, root, rounding)
    else:
        write(exp_avg_sq, v, rounding)


def write_exp_avg(
    exp_avg: StateStorage, exp_avg_sq: StateStorage | None, m: torch.Tensor, rounding: Stochastic | None = None
) -> None:
    """Store m [n] fp32 in place; `exp_avg_sq`, if there is one, holds what belongs to it already."""
    if exp_avg_sq is not None and exp_avg.format in RATIO_FORMATS:
        m = m / _divisor(read_root(exp_avg_sq))
    write(exp_avg, m, rounding)


def round_bf16(x: torch.Tensor, rounding: Stochastic) -> torch.Tensor:
    """`x` fp32 [n] rounded stochastically to bf16: add 16 random bits to the pattern, truncate; NaN stays NaN."""
    random = rounding.bits(x.numel(), x.device) >> 16
    bits = (x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + random
    rounded = (bits >> 16 << 16).to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _store(state: StateStorage, quantized: torch.Tensor, scale_inv: torch.Tensor) -> None:
    assert state.scale_inv is not None
    state.data.copy_(quantized)
    state.scale_inv.copy_(scale_inv)


def _write_fp32(state: StateStorage, values: torch.Tensor, rounding: Stochastic | None) -> None:
    state.data.copy_(values)


def _write_bf16(state: StateStorage, values: torch.Tensor, rounding: Stochastic | None) -> None:
    state.data.copy_(values if rounding is None else round_bf16(values, rounding))


def _write_expanded(state: StateStorage, values: torch.Tensor, rounding: Stochastic | None) -> None:
    quantized, scale_inv, exponents = expansion.encode(values, rounding=rounding)
    assert state.expansion is not None
    state.expansion.copy_(exponents)
    _store(state, quantized, scale_inv)


def _read_expanded(state: StateStorage) -> torch.Tensor:
    assert state.scale_inv is not None and state.expansion is not None
    return expansion.decode(state.data, state.scale_inv, state.expansion)


def _scaled(dtype: torch.dtype, encode: Callable[..., Any], decode: Callable[..., torch.Tensor]) -> Codec:
    """A format with one scale for each block."""
    return Codec(
        dtype,
        ("data", "scale_inv"),
        lambda state: decode(state.data, state.scale_inv),
        lambda state, values, rounding: _store(state, *encode(values, rounding=rounding)),
    )


CODECS: dict[str, Codec] = {
    "fp32": Codec(torch.float32, ("data",), lambda state: state.data.float(), _write_fp32),
    "bf16": Codec(torch.bfloat16, ("data",), lambda state: state.data.float(), _write_bf16),
    "fp16": _scaled(torch.float16, blocks16.encode, blocks16.decode),
    "int8": _scaled(torch.int8, blocks8.encode, blocks8.decode),
    "e4m3": _scaled(torch.uint8, partial(flat.encode, fmt=E4M3), partial(flat.decode, fmt=E4M3)),
    "e4m3_expanded": Codec(
        torch.uint8,
        ("data", "scale_inv", "expansion"),
        _read_expanded,
        _write_expanded,
    ),
}
"""The arithmetic of every format in `levels.STATES`."""
