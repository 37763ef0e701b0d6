"""The square root that torch.optim.Adam takes on this CPU, for steps that promise its very bits.

torch's builds for x86 take fp32 sqrt from MKL (`vmsSqrt`), which on some processors is one unit off IEEE for a fifth of
all numbers. No arithmetic of ours can follow that, but the function is there: MKL is linked into libtorch_cpu, and its
name is exported. So C++ is handed its address and calls it for each block of 128, with the mode bits that torch uses.

Nothing is taken on trust: `entry` compares it with torch.sqrt, in blocks at several alignments and whole, and gives
None if the name is missing (other builds of torch) or one bit differs; such a step then runs in PyTorch.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from ...formats import BLOCK_SIZE

MODE = 0x2 | 0x140000 | 0x100
"""VML_HA, VML_FTZDAZ_OFF, VML_ERRMODE_IGNORE: high accuracy, subnormals kept, no error handler."""

_SAMPLES = 1 << 20
_OFFSETS = (0, 1, 7, 16)


@lru_cache(maxsize=1)
def entry() -> int | None:
    """The address of `vmsSqrt`, once it has proved to be torch's square root; else None."""
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).vmsSqrt
    except (OSError, AttributeError):
        return None
    function.restype = None
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    if not _is_torch_sqrt(function):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def _is_torch_sqrt(function: ctypes._NamedFuncPointer) -> bool:
    """Whether it gives torch.sqrt's bits on random numbers of all sizes, zero, the smallest and infinity among them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F800001, (_SAMPLES,), dtype=torch.int32, device="cpu", generator=generator)
    numbers = bits.view(torch.float32)
    numbers[:3] = torch.tensor([0.0, 1e-45, torch.inf], dtype=torch.float32, device="cpu")
    roots, expected = torch.empty_like(numbers), numbers.sqrt()
    for offset in _OFFSETS:
        for start in range(offset, _SAMPLES - BLOCK_SIZE + 1, BLOCK_SIZE):
            address = 4 * start
            function(BLOCK_SIZE, numbers.data_ptr() + address, roots.data_ptr() + address, MODE)
        covered = slice(offset, start + BLOCK_SIZE)
        if not torch.equal(roots[covered], expected[covered]):
            return False
    return True
