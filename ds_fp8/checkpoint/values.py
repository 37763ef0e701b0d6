"""What a value of DeepSpeed's entries in a checkpoint may be, and how a message shows one that may not."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import CheckpointError

MOST_STEPS = 1 << 53
"""Counters above it are damage: fp32 and JSON could not hold them either."""


def holds_values(value: Any) -> bool:
    """A tensor of numbers in memory of its own: not sparse, not on `meta`, not one element that stands for many."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.device.type == "meta":
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def check_tensor(value: Any, shapes: set[tuple[int, ...]] | None, name: str, where: str) -> None:
    """Raise CheckpointError unless `value` is a tensor of floating-point values of one of `shapes` (None: of any)."""
    if not holds_values(value):
        raise CheckpointError(f"{where}: {name} is {shown(value)}, expected a tensor of values; it is damaged.")
    if not value.is_floating_point():
        raise CheckpointError(f"{where}: {name} is {value.dtype}, expected floating point; it is damaged.")
    if shapes is not None and tuple(value.shape) not in shapes:
        expected = " or ".join(map(str, sorted(shapes)))
        raise CheckpointError(f"{where}: {name} has shape {tuple(value.shape)}, expected {expected}; it is damaged.")


def is_count(value: Any, least: int = 0) -> bool:
    """A whole number from `least` on that fp32 and JSON could hold."""
    return type(value) is int and least <= value < MOST_STEPS


def is_step(value: Any, fraction: bool = False) -> bool:
    """The same, as a number or a tensor of one.

    fraction  a tensor must be of floating point, as torch's Adam keeps it
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or not holds_values(value) or value.is_complex():
            return False
        if fraction and not value.is_floating_point():
            return False
        value = value.item()
    return is_finite_number(value) and float(value).is_integer() and 0 <= value < MOST_STEPS


def is_finite_number(value: Any) -> bool:
    """A number, or a tensor of one; a whole number that no tensor could hold is none."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and value.device.type != "meta" and bool(torch.isfinite(value).all())
    return isinstance(value, (int, float)) and abs(value) < (2**63 if isinstance(value, int) else math.inf)


def is_negative(value: Any) -> bool:
    """Adafactor's `lr` may be None, its `eps` a pair."""
    return is_finite_number(value) and float(value) < 0


def is_version(value: Any) -> bool:
    """Text that begins as a version does."""
    return isinstance(value, str) and value[:1].isdigit() and len(value) < 100


def same_kind(value: Any, own: Any, finite: bool = True) -> bool:
    """Whether `value` could stand where this job has `own`. What is no number, flag, text or list is not compared.

    finite  a number must be; a scheduler may keep an infinity (the best loss so far), never a NaN
    """
    if own is None:
        return True
    if isinstance(own, bool):
        return isinstance(value, bool) or (value is None and not own)
    if isinstance(own, (int, float)) or (isinstance(own, torch.Tensor) and own.numel() == 1):
        if not finite and isinstance(value, float) and math.isinf(value):
            return True
        most = MOST_STEPS if isinstance(own, int) else math.inf
        return not isinstance(value, bool) and is_finite_number(value) and abs(value) < most
    if isinstance(own, str):
        return isinstance(value, str)
    if isinstance(own, (list, tuple)) and len(own):
        fits = isinstance(value, (list, tuple)) and len(value) == len(own)
        return fits and all(same_kind(one, other, finite) for one, other in zip(value, own, strict=True))
    return True


def shown(value: Any) -> str:
    """For a message: short, and of a tensor its form alone."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} {value.dtype}, {value.layout} on {value.device.type}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}... ({type(value).__name__})"
