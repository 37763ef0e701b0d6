"""Random bits from a counter, and rounding with them.

Stochastic rounding must be repeatable: a resumed job draws what the uninterrupted one would have drawn, and PyTorch,
C++ and Triton draw the same. So there is no generator with a hidden state; the bits are a function of four integers:

    mix(h):  h ^= h >> 16;  h *= 0x7feb352d;  h ^= h >> 15;  h *= 0x846ca68b;  h ^= h >> 16          (all in uint32)
    bits(index, seed, step, stream) = mix(index ^ mix(seed ^ mix(step ^ mix(stream))))

`index` is the number of the element in its partition (mod 2^32), `stream` names the use. The inner three mixes are one
`key` for the whole partition.

A step of Adam rounds an element up to three times, and draws one word for it (stream 1), since a word costs as much as
a rounding. Each rounding takes its bits from the top of the word shifted left by a number of its own: exp_avg by 0,
master by 12, exp_avg_sq by 20. So their upper 12, 8 and 12 bits are disjoint; what overlaps below them decides less
than 2^-8 of a unit, which makes no correlation that could be seen.

Rounding a magnitude to a format with `m` mantissa bits whose smallest normal exponent is `e0`: on the grid of width
ulp = 2^(max(exponent, e0) - m) the value lies between two neighbours; take the upper one with probability equal to
the fraction passed. With d = 23 - m dropped bits:

    q = |x| / ulp                       exact, a power of two
    q = floor(q + float(bits >> (32 - d)) * 2^-d)     product exact, one fp32 addition
    |result| = q * ulp                  exact

For normal values that is the same as adding `bits >> (32 - d)` to the fp32 bit pattern and truncating.
Source of the mixing constants: C. Wellons, hash-prospector (public domain), the low-bias 32-bit mix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ADAM_STREAM = 1
EXP_AVG_SHIFT = 0
EXP_AVG_SQ_SHIFT = 20
MASTER_SHIFT = 12

_WORD = 0xFFFFFFFF


def mix(h: int) -> int:
    """The 32-bit mix of one Python integer."""
    h &= _WORD
    h ^= h >> 16
    h = h * 0x7FEB352D & _WORD
    h ^= h >> 15
    h = h * 0x846CA68B & _WORD
    return h ^ (h >> 16)


def unmix(h: int) -> int:
    """The integer that `mix` makes `h` of: every step of it can be undone."""
    h ^= h >> 16
    h = h * pow(0x846CA68B, -1, 1 << 32) & _WORD
    h ^= (h >> 15) ^ (h >> 30)
    h = h * pow(0x7FEB352D, -1, 1 << 32) & _WORD
    return h ^ (h >> 16)


def seed_at(first: int, seed: int, step: int, stream: int) -> int:
    """A seed with which a chunk that counts from 0 draws the words that its partition draws from element `first` on.

    `first` is a multiple of a power of two that is no less than the chunk's length, so that first + i = first ^ i, and
    the key of the chunk is the partition's ^ first.
    """
    if not first:
        return seed
    inner = mix(step ^ mix(stream))
    return unmix(mix(seed ^ inner) ^ (first & _WORD)) ^ inner


def mix_tensor(h: torch.Tensor) -> torch.Tensor:
    """The same for a tensor of int64 that hold 32-bit words. int64 products wrap, their low 32 bits stay right."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D & _WORD
    h = h ^ (h >> 15)
    h = h * 0x846CA68B & _WORD
    return h ^ (h >> 16)


@dataclass(frozen=True)
class Stochastic:
    """Asks for stochastic rounding; three integers are its whole state.

    first  index of the first element, when a call sees only a chunk of the partition
    shift  the words are shifted left by this much: roundings of the same element share a word
    """

    seed: int
    step: int
    stream: int
    first: int = 0
    shift: int = 0

    @property
    def key(self) -> int:
        """mix(seed ^ mix(step ^ mix(stream))): the same for all elements."""
        return mix(self.seed ^ mix(self.step ^ mix(self.stream)))

    def at(self, first: int) -> Stochastic:
        """The same source for a chunk that starts at element `first`."""
        return Stochastic(self.seed, self.step, self.stream, self.first + first, self.shift)

    def bits(self, numel: int, device: torch.device) -> torch.Tensor:
        """`numel` random words as int64 in [0, 2^32)."""
        index = torch.arange(self.first, self.first + numel, dtype=torch.int64, device=device)
        return mix_tensor((index ^ self.key) & _WORD) << self.shift & _WORD


def round_to_grid(x: torch.Tensor, mantissa_bits: int, min_exponent: int, bits: torch.Tensor) -> torch.Tensor:
    """`x` (fp32, finite) rounded stochastically as above; fp32 values that the format holds exactly; sign kept.

    The caller clamps to the format's largest value first: that value is on the grid, so the result stays below it.
    """
    dropped = 23 - mantissa_bits
    exponent = (x.view(torch.int32) >> 23 & 0xFF) - 127
    ulp_exponent = exponent.clamp(min=min_exponent) - mantissa_bits
    whole = x.abs() * power_of_two(-ulp_exponent)
    fraction = (bits >> (32 - dropped)).float() * 2.0**-dropped
    return torch.copysign(torch.floor(whole + fraction) * power_of_two(ulp_exponent), x)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2 ** exponent for int32 exponents from -126 to 127, made of bits: exact, which torch.ldexp does not promise."""
    return (exponent + 127 << 23).view(torch.float32)
