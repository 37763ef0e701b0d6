"""How every kernel of this package is started.

Fused multiply-add is switched off: `a * b + c` rounded once differs from the CPU, which rounds twice, and the promise is
equality bit for bit. It costs nothing here, because these kernels wait for memory.
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

_hardware = True
_HERE = nullcontext()


_REPEATS = triton.__version__.startswith("3.6.") and not INTERPRETED
_compiled: dict[Any, Any] = {}


def start(kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], key: tuple[Any, ...], **options: Any) -> None:
    """`kernel[grid](*arguments)`, where the host's time counts: the second launch under one `key` skips Triton's binder.

    arguments  all of them in order, constants too, the tensors on the current device
    key        everything by which Triton would compile another kernel: dtypes, constants, whether addresses and integers
               are multiples of 16
    Only with a Triton whose launcher is known (3.6: half of the 34 microseconds of a launch); others go the long way.
    """
    key = (kernel, torch.cuda.current_device() if not INTERPRETED else -1, key)
    found = _compiled.get(key)
    if found is None:
        found = kernel[grid](*arguments, **options, **LAUNCH)
        if _REPEATS:
            _compiled[key] = found
        return
    stream = triton.runtime.driver.active.get_current_stream(key[1])
    found.run(grid[0], grid[1], 1, stream, found.function, found.packed_metadata, None, None, None, *arguments)


def use_hardware_casts(wanted: bool) -> bool:
    """Choose between the device's FP8 casts and integer arithmetic (equal results; for tests); returns the old choice."""
    global _hardware
    before, _hardware = _hardware, wanted
    return before


def hardware_casts(tensor: torch.Tensor) -> bool:
    """Whether kernels on this tensor's device may use FP8 conversion instructions (Ada, Hopper and later)."""
    if INTERPRETED or not _hardware or not tensor.is_cuda:
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
