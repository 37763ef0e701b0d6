"""The one place where a `Format` becomes a torch dtype.

The floors below do not import torch, so a `Format` carries only the dtype's name. An e4m3 or e5m2 code travels as
`uint8` wherever a library cannot carry float8 (gloo, checkpoints): a view changes no bit, and the `Format` always
stands beside the bytes.
"""

from __future__ import annotations

import torch

from ..formats import FORMATS, Format

BASE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a model's parameters may be: the names of DeepSpeed's sections."""


def torch_dtype(fmt: Format) -> torch.dtype:
    """The torch dtype that stores `fmt`."""
    return getattr(torch, fmt.torch_name)


def format_of(dtype: torch.dtype) -> Format:
    """The `Format` that a torch dtype stores; KeyError-free: an unknown dtype is our own mistake."""
    for fmt in FORMATS.values():
        if torch_dtype(fmt) == dtype:
            return fmt
    raise ValueError(f"{dtype} is none of {', '.join(FORMATS)}")


def as_tensor(value: torch.Tensor | float) -> torch.Tensor:
    """A tensor itself, a number as a 0-d tensor on the CPU. `torch.as_tensor` would take a tensor to the device of
    `torch.set_default_device`.
    """
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")


def as_quantized(data: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The same storage as float8 values of `fmt`."""
    return data.view(torch_dtype(fmt))
