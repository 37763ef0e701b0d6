"""How the master lies in `optimizer.state[p]`, and its way to fp32 and back.

Keys: none when the parameter is its own master (fp32); `master` for an fp32 master, which is the value itself;
`master.data` (a remainder, or fp16 values) and `master.scale_inv` otherwise. The parameter is always the other half:
whoever writes it from outside must import the master again, or the remainder of the old weight is added to the new one.
"""

from __future__ import annotations

from typing import Any

import torch

from ..levels import MASTERS, OWN
from ..numerics import masters
from ..numerics.masters import CODECS, MasterStorage
from .codecs import chunks

EXACT_FORMATS = frozenset({OWN, *(name for name, fmt in MASTERS.items() if fmt.is_exact)})
"""Masters that are fp32."""


def format_for(fmt: str, param: torch.Tensor) -> str:
    """The format that `param` really has: an fp32 parameter is its own master."""
    return OWN if param.dtype == torch.float32 else fmt


def keys_of(fmt: str) -> dict[str, str]:
    """Field of MasterStorage -> key in `optimizer.state[p]`."""
    if fmt == "fp32":
        return {"data": "master"}  # the value itself, under the name that other code reads
    return {field: f"master.{field}" for field in CODECS[fmt].fields}


def new_master(fmt: str, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of a master that equals the flat `param` [n], by key."""
    keys = keys_of(format_for(fmt, param))
    return {keys[field]: tensor for field, tensor in masters.new_master(fmt, param).tensors().items()}


def master_storage(state: dict[str, Any], fmt: str, param: torch.Tensor) -> MasterStorage:
    """The master as the kernels take it: the same tensors."""
    real = format_for(fmt, param)
    return MasterStorage(real, **{field: state[key] for field, key in keys_of(real).items()})


def export_master(
    state: dict[str, Any], fmt: str, param: torch.Tensor, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Elements [start, stop) of the master of the flat `param` as a fresh fp32 tensor."""
    quantized = master_storage(state, fmt, param)
    stop = param.numel() if stop is None else stop
    out = torch.empty(stop - start, dtype=torch.float32, device=param.device)
    for first, last in chunks(start, stop):
        skipped = max(start - first, 0)
        values = masters.read(quantized.chunk(first, last), param[first:last])
        out[first + skipped - start : last - start].copy_(values[skipped:])
    return out


def import_master(state: dict[str, Any], fmt: str, param: torch.Tensor, values: torch.Tensor) -> None:
    """Encode fp32 `values` [n] in place, to nearest: the master, and the flat `param` with it."""
    quantized = master_storage(state, fmt, param)
    for first, last in chunks(0, param.numel()):
        chunk = values[first:last].detach().to(param.device, torch.float32)
        masters.write(quantized.chunk(first, last), param[first:last], chunk)


def upper_half(fmt: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The parameter that `import_master` of flat fp32 `values` leaves, for ranks that have no master of it.

    A remainder is rounded half up and a cast half to even, so at ties a cast is not what the owner has.
    """
    param = values.to(dtype)
    real = format_for(fmt, param)
    for first, last in chunks(0, param.numel()):
        chunk = param[first:last]
        masters.write(masters.new_master(real, chunk), chunk, values[first:last].float())
    return param
