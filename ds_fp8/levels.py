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

from dataclasses import dataclass, replace

from .formats import BLOCK_SIZE

OPT_LEVELS = ("O1", "O2", "O3")
STATE_FORMATS = ("fp32", "bf16", "fp16", "e4m3", "e4m3_expanded")
"""What holds either moment. int8 holds exp_avg alone: its codes are evenly spaced, and a root spans decades."""

EXP_AVG_FORMATS = (*STATE_FORMATS, "int8")
MASTER_FORMATS = ("fp32", "split32", "split24", "fp16")
ROUNDINGS = ("nearest", "stochastic")
GRADIENT_WIRES = ("e4m3", "e5m2", "none")
GRADIENT_WIRE_SCOPES = ("all", "inter_node")
WEIGHT_WIRES = ("e4m3", "none")

STATE_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0 + 4 / BLOCK_SIZE,
    "e4m3": 1.0 + 4 / BLOCK_SIZE,
    "e4m3_expanded": 1.0 + 5 / BLOCK_SIZE,
    "int8": 1.0 + 4 / BLOCK_SIZE,
}
"""Bytes per parameter of one optimizer state, scales included."""

MASTER_EXTRA_BYTES = {"fp32": 4.0, "split32": 2.0, "split24": 1.0, "fp16": 2.0 + 4 / BLOCK_SIZE}
"""Bytes per parameter of the master *beside* the 16-bit weight partition that ZeRO keeps anyway."""


@dataclass(frozen=True)
class Level:
    """The formats of one level, after overrides.

    exp_avg                one of EXP_AVG_FORMATS; the 8-bit ones store its ratio to the root of exp_avg_sq
    exp_avg_sq             one of STATE_FORMATS; fp16 and the 8-bit ones store its root
    master                 one of MASTER_FORMATS
    rounding               how codes of states and masters are rounded
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

        A scaled fp16 master loses most of a small update to nearest rounding (docs/numerics.md), so `rounding`
        left to us becomes `stochastic` there.
        """
        chosen = {key: value for key, value in changes.items() if value is not None and value != "auto"}
        level = replace(self, **chosen)  # type: ignore[arg-type]
        if level.master == "fp16" and "rounding" not in chosen:
            level = replace(level, rounding="stochastic")
        return level


LEVELS = {
    "O1": Level("O1", exp_avg="fp32", exp_avg_sq="fp32", master="split32"),
    "O2": Level("O2", exp_avg="int8", exp_avg_sq="fp16", master="split24"),
    "O3": Level("O3", exp_avg="int8", exp_avg_sq="fp16", master="split24", weight_wire="e4m3"),
}
