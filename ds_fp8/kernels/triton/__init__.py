"""Triton kernels: the GPU's counterparts of `numerics`, one pass over memory each, without a host synchronisation.

    codec.py     FP8 values by integer arithmetic or by the hardware's cast; random bits; block scales
    cast.py      one scale per tensor: quantized values, transposed data and amax from one read
    blocks.py    1x128 groups and 128x128 tiles of matrix operands
    flat.py      flat partitions: encode, decode, sum over ranks
    messages.py  the same for all messages of a round in one launch, from wherever a bucket holds them
    states.py, masters.py, adam.py      the fused optimizer step;  adam_fast.py  its fast path
    segments.py  many weights in one launch
    grouped.py   operands of stacked experts;  expert_tiles.py  which rows a program takes
    expert_rows.py, gates.py, visits.py  biases of experts, their activations, and their rows back to tokens
    entry.py     the names that `kernels.dispatch` calls

With TRITON_INTERPRET=1 they run on CPU tensors too and give the same bits: that is how CI checks them.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from types import ModuleType


@functools.cache
def library() -> ModuleType | None:
    """The kernels for `kernels.dispatch`; None, after one warning, where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "ds_fp8: Triton is not installed, so FP8 casts and optimizer steps on this GPU run in PyTorch, many "
            "times slower. Install triton (pip install ds-fp8[triton]).",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    from . import entry

    return entry
