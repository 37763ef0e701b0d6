"""The memory behind a released Parameter: one NaN that stops whoever asks for its address.

Code in C++ that gets the Parameter itself, as a function bound with pybind11 does, passes torch's dispatch by and asks
the storage for an address. Two guards of torch's own make that an error:

    torch built for CUDA   any address, to read or to write, even by an operator that C++ calls: RuntimeError with the
                           weight's name and the cure (what CUDA graphs do to memory that is gone)
    torch built for CPUs   an address to write through, `data_ptr()`, which most extensions take to read as well:
                           torch's RuntimeError, which knows no name. `const_data_ptr()` and operators that C++ calls
                           read the NaN: this build has nothing for them

No memory at all would end the process: torch 2.13 does not look before it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

WITH_MESSAGE, TO_WRITE = "_set_storage_data_ptr_access_error_msg", "_set_throw_on_mutable_data_ptr"
"""Names in `torch._C`: the first is there in builds for CUDA, the second everywhere."""


def blank(dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> Tensor:
    """One element that stands for all of `shape`, unguarded."""
    return _element(dtype, device).expand(tuple(shape))


def guarded(dtype: torch.dtype, device: torch.device, shape: Sequence[int], message: str) -> Tensor:
    """The same, with an error for who asks for its address. What torch does without one goes on: shapes, views,
    autograd, `.data = ...`.
    """
    return _guarded_element(dtype, device, message).expand(tuple(shape))


@functools.cache
def _element(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1,), torch.nan, dtype=dtype, device=device)


@functools.cache
def _guarded_element(dtype: torch.dtype, device: torch.device, message: str) -> Tensor:
    element = torch.full((1,), torch.nan, dtype=dtype, device=device)
    with_message, to_write = getattr(torch._C, WITH_MESSAGE, None), getattr(torch._C, TO_WRITE, None)
    if with_message is not None:
        with_message(element.untyped_storage()._cdata, message)
    elif to_write is not None:
        to_write(element)
    return element
