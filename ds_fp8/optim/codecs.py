"""How the two moments lie in `optimizer.state[p]`: tensors, some under torch's names and some under ours.

A format that stores the value itself (fp32, bf16) uses the name that every Adam uses, `exp_avg`, so other code
reads the right value there. A quantized format uses dotted names, `exp_avg.data`, `exp_avg.scale_inv`,
`exp_avg.expansion`: code that expects torch's Adam then finds nothing, instead of bytes that it would take for numbers.

In 8 bits exp_avg is a ratio to the root of exp_avg_sq (numerics/states.py): to read it takes both, and a new exp_avg_sq
encodes exp_avg anew, so that its value stays.

Export and import go through fp32 in chunks of the pass's size; an import rounds to nearest, whatever the step does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..algorithms import MOMENTS
from ..formats import BLOCK_SIZE
from ..kernels.adam import CHUNK_NUMEL
from ..numerics import states
from ..numerics.adam import ieee_sqrt
from ..numerics.states import RATIO_FORMATS, StateStorage


def keys_of(moment: str, fmt: str) -> dict[str, str]:
    """Field of StateStorage -> key in `optimizer.state[p]`."""
    fields = states.CODECS[fmt].fields
    return {"data": moment} if fields == ("data",) else {field: f"{moment}.{field}" for field in fields}


def new_moment(moment: str, fmt: str, numel: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Tensors of a moment that is zero, by key."""
    keys = keys_of(moment, fmt)
    return {keys[field]: tensor for field, tensor in states.new_state(fmt, numel, device).tensors().items()}


def moment_storage(state: dict[str, Any], moment: str, fmt: str) -> StateStorage:
    """The moment as the kernels take it: the same tensors."""
    return StateStorage(fmt, **{field: state[key] for field, key in keys_of(moment, fmt).items()})


def stored_moments(state: dict[str, Any], formats: Mapping[str, str]) -> tuple[StateStorage, StateStorage | None]:
    """exp_avg and exp_avg_sq as the kernels take them; None for a second moment that the algorithm has not."""
    exp_avg, exp_avg_sq = (
        moment_storage(state, moment, formats[moment]) if moment in formats else None for moment in MOMENTS
    )
    assert exp_avg is not None, "every algorithm keeps exp_avg"
    return exp_avg, exp_avg_sq


def export_moment(
    state: dict[str, Any], moment: str, formats: Mapping[str, str], start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Elements [start, stop) of m or v (never a root or a ratio) as a fresh fp32 tensor."""
    exp_avg, exp_avg_sq = stored_moments(state, formats)
    stop = exp_avg.data.numel() if stop is None else stop
    out = torch.empty(stop - start, dtype=torch.float32, device=exp_avg.data.device)
    for first, last in chunks(start, stop):
        squares = None if exp_avg_sq is None else exp_avg_sq.chunk(first, last)
        if moment == "exp_avg":
            values = states.read_exp_avg(exp_avg.chunk(first, last), squares)
        else:
            assert squares is not None, f"no state {moment}"
            values = states.read_exp_avg_sq(squares)
        skipped = max(start - first, 0)
        out[first + skipped - start : last - start].copy_(values[skipped:])
    return out


def import_moments(
    state: dict[str, Any], formats: Mapping[str, str], values: Mapping[str, torch.Tensor | None]
) -> None:
    """Encode fp32 `values` [n], by moment, into the tensors of `state`, in place, to nearest; None stays as it is.

    exp_avg_sq comes first: an exp_avg that is a ratio is encoded after it, and anew if it was not given.
    """
    exp_avg, exp_avg_sq = stored_moments(state, formats)
    given_m, given_v = (values.get(moment) for moment in MOMENTS)
    for first, last in chunks(0, exp_avg.data.numel()):
        quantized_m = exp_avg.chunk(first, last)
        quantized_v = None if exp_avg_sq is None else exp_avg_sq.chunk(first, last)
        m = None if given_m is None else _chunk(given_m, first, last, quantized_m)
        if given_v is not None and quantized_v is not None:
            if m is None and exp_avg.format in RATIO_FORMATS:
                m = states.read_exp_avg(quantized_m, quantized_v)
            v = _chunk(given_v, first, last, quantized_v)
            states.write_exp_avg_sq(quantized_v, v, ieee_sqrt(v))
        if m is not None:
            states.write_exp_avg(quantized_m, quantized_v, m)


def depends_on_squares(moment: str, formats: Mapping[str, str]) -> bool:
    """Whether the quantized values of `moment` mean something only beside those of exp_avg_sq."""
    return moment == "exp_avg" and "exp_avg_sq" in formats and formats["exp_avg"] in RATIO_FORMATS


def _chunk(values: torch.Tensor, first: int, last: int, like: StateStorage) -> torch.Tensor:
    return values[first:last].detach().to(like.data.device, torch.float32)


def chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover [start, stop), each starting at a block and no longer than one chunk of the pass."""
    for first in range(start - start % BLOCK_SIZE, stop, CHUNK_NUMEL):
        yield first, min(first + CHUNK_NUMEL, stop)
