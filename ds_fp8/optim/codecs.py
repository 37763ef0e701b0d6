"""How the two moments lie in `optimizer.state[p]`: plain tensors under plain names.

A format that stores the value itself (fp32, bf16) uses the name that every Adam uses, `exp_avg`, so whoever looks there
finds the truth. A coded format uses dotted names, `exp_avg.data`, `exp_avg.scale_inv`, `exp_avg.expansion`: code that
expects a plain state then finds nothing, instead of bytes that it would take for numbers.

Export and import go through fp32 in pieces of the pass's size; an import rounds to nearest, whatever the step does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..formats import BLOCK_SIZE
from ..kernels.adam import PIECE_NUMEL
from ..numerics import states
from ..numerics.adam import ieee_sqrt
from ..numerics.states import ROOT_FORMATS, StateCodes

MOMENTS = ("exp_avg", "exp_avg_sq")
PLAIN_FORMATS = frozenset({"fp32", "bf16"})


def keys_of(moment: str, fmt: str) -> dict[str, str]:
    """Field of StateCodes -> key in `optimizer.state[p]`."""
    if fmt in PLAIN_FORMATS:
        return {"data": moment}
    fields = ("data", "scale_inv", "expansion") if fmt == "e4m3_expanded" else ("data", "scale_inv")
    return {field: f"{moment}.{field}" for field in fields}


def new_moment(moment: str, fmt: str, numel: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Tensors of a moment that is zero, by key."""
    keys = keys_of(moment, fmt)
    return {keys[field]: tensor for field, tensor in states.new_state(fmt, numel, device).tensors().items()}


def moment_codes(state: dict[str, Any], moment: str, fmt: str) -> StateCodes:
    """The moment as the kernels take it: the same tensors."""
    return StateCodes(fmt, **{field: state[key] for field, key in keys_of(moment, fmt).items()})


def export_moment(
    state: dict[str, Any], moment: str, fmt: str, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Elements [start, stop) of m or v (never its root) as a fresh fp32 tensor."""
    codes = moment_codes(state, moment, fmt)
    stop = codes.data.numel() if stop is None else stop
    out = torch.empty(stop - start, dtype=torch.float32, device=codes.data.device)
    for first, last in pieces(start, stop):
        values = states.read(codes.piece(first, last))
        if moment == "exp_avg_sq" and fmt in ROOT_FORMATS:
            values = values * values
        skipped = max(start - first, 0)
        out[first + skipped - start : last - start].copy_(values[skipped:])
    return out


def import_moment(state: dict[str, Any], moment: str, fmt: str, values: torch.Tensor) -> None:
    """Encode fp32 `values` [n] of m or v into the tensors of `state`, in place, to nearest."""
    codes = moment_codes(state, moment, fmt)
    for first, last in pieces(0, codes.data.numel()):
        piece = values[first:last].detach().to(codes.data.device, torch.float32)
        if moment == "exp_avg_sq" and fmt in ROOT_FORMATS:
            states.write_root(codes.piece(first, last), ieee_sqrt(piece))
        else:
            states.write(codes.piece(first, last), piece)


def pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover [start, stop), each starting at a block and no longer than one piece of the pass."""
    for first in range(start - start % BLOCK_SIZE, stop, PIECE_NUMEL):
        yield first, min(first + PIECE_NUMEL, stop)
