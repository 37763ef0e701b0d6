"""How every kernel of this package is started.

Fused multiply-add is switched off: `a * b + c` rounded once differs from the CPU, which rounds twice, and the promise
is equality bit for bit. It costs nothing here, because these kernels wait for memory.
"""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

LAUNCH: dict[str, Any] = {"enable_fp_fusion": False}
"""Launch options of all kernels; the interpreter ignores them."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads this variable when a kernel is decorated; the interpreter runs kernels on CPU tensors."""

_HERE = nullcontext()

_LAUNCHER_IS_KNOWN = triton.__version__.startswith("3.6.") and not INTERPRETED


class Launch:
    """One kernel with its constants, started where the host's time counts.

    Triton's binder looks at every argument of every launch: half of the 34 microseconds that one costs on the host of
    an H200, and its launcher asks the driver about each tensor. So the first call on a device goes that way and
    compiles; later ones hand addresses and integers to the compiled kernel's launcher. Only with a Triton whose
    launcher is known (3.6).

    One instance is one compilation: its caller keeps dtypes, alignment to 16 bytes and divisibility by 16 the same, and
    names integers in `do_not_specialize` that are neither.
    constants  the last arguments of the kernel, in order
    """

    def __init__(self, kernel: Any, constants: tuple[Any, ...], **options: Any):
        self._kernel = kernel
        self._constants = constants
        self._options = options
        self._built: dict[int, Any] = {}

    def __call__(self, grid: tuple[int, ...], tensors: tuple[torch.Tensor, ...], *integers: int) -> None:
        """Start on the current stream of the device of `tensors`, which are the kernel's first arguments."""
        device = tensors[0].get_device()
        built = self._built.get(device)
        if built is None or torch._C._cuda_getDevice() != device:
            with on_device(tensors[0]):
                found = self._kernel[grid](*tensors, *integers, *self._constants, **self._options, **LAUNCH)
            if _LAUNCHER_IS_KNOWN and not (found.run.global_scratch_size or found.run.profile_scratch_size):
                self._built[device] = found.run, found.function, found.packed_metadata
            return
        run, function, metadata = built
        run.launch(
            grid[0],
            grid[1],
            grid[2] if len(grid) > 2 else 1,
            torch._C._cuda_getCurrentRawStream(device),
            function,
            run.launch_cooperative_grid,
            run.launch_pdl,
            None,  # scratch memory
            None,
            metadata,
            None,  # hooks
            None,
            None,
            *[tensor.data_ptr() for tensor in tensors],
            *integers,
            *self._constants,
        )


def kind(number: int) -> int:
    """What Triton looks at in an integer: a multiple of 16, one, or any."""
    return 16 if number % 16 == 0 else number == 1


def hardware_casts(tensor: torch.Tensor) -> bool:
    """Whether kernels on this tensor's device may use FP8 conversion instructions (Ada, Hopper and later)."""
    if INTERPRETED or not tensor.is_cuda:
        return False
    return _converts_fp8(tensor.device)


@functools.cache
def _converts_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current: Triton launches on the current one, whatever the pointers say."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)
