"""The C++ kernels: the same functions as `ds_fp8.numerics`, at the speed of memory.

    build.py     compile (setup.py, or at first use into the user's cache)
    loader.py    find, check, load; choose AVX-512, AVX2 or portable; share PyTorch's threads
    jobs.py      the structs that Python and C++ exchange
    casts.py     quantize, dequantize, amax, 1x128 and 128x128 tiles
    flat.py      flat partitions: encode, decode, sum over ranks
    adam.py      the fused optimizer step
    torch_sqrt.py  the square root of torch.optim.Adam, for steps that promise its bits

and in C++, from the bottom: vectors.h (one vector, any width), formats.h (what a code means), blocks.h (128 elements
between two trips to memory), rounding.h (random bits), then codec.h, flat.h, tiles.h, and for the step blocks8.h,
blocks16.h, expansion.h, states.h, masters.h, packs.h, groups.h, adam.cpp.

`library()` is what `ds_fp8.kernels.dispatch` asks for; `path()` says which path runs, `torch` for none.
"""

from __future__ import annotations

from . import adam, casts, flat, loader, torch_sqrt


class CpuKernels:
    """The functions of this package under the names, and with the positional arguments, of `kernels.dispatch`."""

    quantize = staticmethod(casts.quantize)
    quantize_with_amax = staticmethod(casts.quantize_with_amax)
    dequantize = staticmethod(casts.dequantize)
    amax = staticmethod(casts.amax)
    quantize_1x128 = staticmethod(casts.quantize_1x128)
    quantize_128x128 = staticmethod(casts.quantize_128x128)
    dequantize_1x128 = staticmethod(casts.dequantize_1x128)
    dequantize_128x128 = staticmethod(casts.dequantize_128x128)
    flat_encode = staticmethod(flat.encode)
    flat_decode = staticmethod(flat.decode)
    flat_sum = staticmethod(flat.sum_contributions)
    flat_sum_encode = staticmethod(flat.sum_and_encode)
    adam_step = staticmethod(adam.adam_step)

    @property
    def has_torch_sqrt(self) -> bool:
        """Whether a step may ask for torch's own square root."""
        return torch_sqrt.entry() is not None

    @property
    def path(self) -> str:
        """`avx512`, `avx2` or `portable`."""
        return loader.path()


_KERNELS = CpuKernels()


def library() -> CpuKernels | None:
    """The kernels, compiled if need be; None when there are none and none can be compiled (one warning was given)."""
    return None if loader.load() is None else _KERNELS


def path() -> str:
    """`avx512`, `avx2` or `portable`; `torch` when `library()` is None."""
    return loader.path()
