"""Bytes of what lives in a process, for measures of memory."""

from __future__ import annotations

import gc

import torch


def storages() -> dict[int, tuple[int, str]]:
    """Bytes of every storage that a living tensor of the CPU has, and one tensor's description; by the storage's
    identity, since a released weight (O3) gives no address.
    """
    gc.collect()
    found = {}
    # A released weight decodes itself for whoever asks it for memory, and would keep what it decoded.
    with torch._C.DisableTorchFunctionSubclass():
        for one in gc.get_objects():
            if isinstance(one, torch.Tensor) and one.device.type == "cpu":
                storage = one.untyped_storage()
                found[storage._cdata] = storage.nbytes(), f"{type(one).__name__} {one.dtype} {tuple(one.shape)}"
    return found
