"""The levels O1, O2, O3 as one table: which format keeps which tensor.

A level only sets defaults; a key of the `msamp` section overrides one of them. Bytes per parameter, before ZeRO
divides the sharded ones by the world size:

    level  weight  master            gradient wire  exp_avg        exp_avg_sq           states + master
    AMP    2       fp32 4            2 or 4         fp32 4         fp32 4               12
    O1     2       split32 +2        e4m3 1         fp32 4         fp32 4               10
    O2     2       split24 +1        e4m3 1         int8 1.03      sqrt in fp16 2.03    4.1
    O3     e4m3 1  split24 +1 (+2)   e4m3 1         int8 1.03      sqrt in fp16 2.03    6.1

`split32` is the 16-bit weight plus a 16-bit remainder: fp32, exactly. `split24` keeps eight bits of the remainder.
At O3 the 16-bit half of the master is no longer the working weight of every rank, so it counts as sharded state.
Source: MS-AMP's table of levels; FP8-LM (arXiv 2310.18313), section 2; docs/numerics.md for what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .formats import BLOCK_SIZE

OPT_LEVELS = ("O1", "O2", "O3")


@dataclass(frozen=True)
class StateFormat:
    """A format of one optimizer state, without its arithmetic: `numerics.states.CODECS` reads and writes it.

    bytes             per parameter, scales included
    holds_exp_avg_sq  whether the second moment may lie in it
    keeps_root        the second moment in it is its square root
    keeps_ratio       the first moment in it is its ratio to the root of the second, where the algorithm has a second
    cpp, triton       its number in kernels/cpu/states.h and kernels/triton/states.py; None: no kernel there knows it,
                      and the step of a state in it is PyTorch's
    """

    bytes: float
    holds_exp_avg_sq: bool = True
    keeps_root: bool = False
    keeps_ratio: bool = False
    cpp: int | None = None
    triton: int | None = None


STATES = {
    "fp32": StateFormat(4.0, cpp=0, triton=0),
    "bf16": StateFormat(2.0, cpp=1, triton=1),
    "fp16": StateFormat(2.0 + 4 / BLOCK_SIZE, keeps_root=True, cpp=2, triton=2),
    "e4m3": StateFormat(1.0 + 4 / BLOCK_SIZE, keeps_root=True, keeps_ratio=True, cpp=3, triton=3),
    "e4m3_expanded": StateFormat(1.0 + 5 / BLOCK_SIZE, keeps_root=True, keeps_ratio=True, cpp=4, triton=4),
    "int8": StateFormat(1.0 + 4 / BLOCK_SIZE, holds_exp_avg_sq=False, keeps_ratio=True, cpp=5, triton=5),
}
"""Every format of a state by its name in the JSON. int8 holds exp_avg alone: it is evenly spaced, and a root spans
decades.
"""

STATE_FORMATS = tuple(name for name, fmt in STATES.items() if fmt.holds_exp_avg_sq)
EXP_AVG_FORMATS = tuple(STATES)
ABSENT = "none"
"""Format of a state that the algorithm does not keep (Lion's exp_avg_sq)."""


@dataclass(frozen=True)
class MasterFormat:
    """A format of the master weight, without its arithmetic: `numerics.masters.CODECS` reads and writes it.

    extra_bytes     per parameter, *beside* the 16-bit weight partition that ZeRO keeps anyway
    is_exact        it holds every bit of fp32 (beside an fp16 weight split32 does from 2^-16 up), so nothing is rounded
    contains_weight the 16-bit weight is a part of it; else that could be made of the master again
    rounding        how it is rounded where the JSON does not say
    cpp, triton     its number in kernels/cpu/jobs.h and kernels/triton/masters.py; None: no kernel there knows it, and
                    the step of such a master is PyTorch's
    """

    extra_bytes: float
    is_exact: bool = False
    contains_weight: bool = False
    rounding: str = "nearest"
    cpp: int | None = None
    triton: int | None = None


MASTERS = {
    "fp32": MasterFormat(4.0, is_exact=True, cpp=1, triton=1),
    "split32": MasterFormat(2.0, is_exact=True, contains_weight=True, cpp=2, triton=2),
    "split24": MasterFormat(1.0, contains_weight=True, cpp=3, triton=3),
    # Nearest rounding loses most of a small update there (docs/numerics.md).
    "fp16": MasterFormat(2.0 + 4 / BLOCK_SIZE, rounding="stochastic", cpp=4, triton=4),
}
"""Every format of a master by its name in the JSON."""

MASTER_FORMATS = tuple(MASTERS)
OWN = "own"
"""What a master is called that is the parameter itself, which an fp32 parameter always is; number 0 in the kernels."""

STATE_BYTES = {name: fmt.bytes for name, fmt in STATES.items()} | {ABSENT: 0.0}
"""Bytes per parameter of one optimizer state, scales included."""


@dataclass(frozen=True)
class Level:
    """The formats of one level, after overrides.

    exp_avg                one of EXP_AVG_FORMATS; the 8-bit ones store its ratio to the root of exp_avg_sq, if any
    exp_avg_sq             one of STATE_FORMATS; fp16 and the 8-bit ones store its root. ABSENT: the algorithm has none
    master                 one of MASTER_FORMATS
    rounding               how quantized values of states and masters are rounded
    gradient_wire          format in which gradients cross the network
    gradient_wire_scope    `inter_node`: high precision inside a node, FP8 between nodes; `auto`: by the machine
    weight_wire            format in which updated weights are gathered
    block_size             elements per scale in a flat partition
    """

    name: str
    exp_avg: str
    exp_avg_sq: str
    master: str
    rounding: str = "nearest"
    gradient_wire: str = "e4m3"
    gradient_wire_scope: str = "auto"
    weight_wire: str = "none"
    block_size: int = BLOCK_SIZE

    def override(self, **changes: object) -> Level:
        """The same level with some formats replaced; `None` and `"auto"` leave the default.

        `rounding` left to us is what the master needs (`MasterFormat.rounding`).
        """
        chosen = {key: value for key, value in changes.items() if value is not None and value != "auto"}
        level = replace(self, **chosen)  # type: ignore[arg-type]
        if level.master in MASTERS and MASTERS[level.master].rounding == "stochastic" and "rounding" not in chosen:
            level = replace(level, rounding="stochastic")
        return level

    def keeping(self, moments: Sequence[str]) -> Level:
        """The same level for an algorithm with these states."""
        return self if "exp_avg_sq" in moments else replace(self, exp_avg_sq=ABSENT)


LEVELS = {
    "O1": Level("O1", exp_avg="fp32", exp_avg_sq="fp32", master="split32"),
    "O2": Level("O2", exp_avg="int8", exp_avg_sq="fp16", master="split24"),
    "O3": Level("O3", exp_avg="int8", exp_avg_sq="fp16", master="split24", weight_wire="e4m3"),
}
