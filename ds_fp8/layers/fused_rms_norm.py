"""RMS norms of model libraries (`plan.known_norms`) run torch's fused kernel; the class changes in place, nothing else
does.

Written out in six operations such a norm reads and writes its tensor a dozen times, and rounds to 16 bits before it
multiplies with the weight. The fused kernel reads and writes it once, and rounds once.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..plan.known_norms import RmsNorm, rms_norm_of
from .as_original import ORIGINAL
from .once import once_for_each

RULE = "_ds_fp8_rms_norm"
"""Attribute with the module's `RmsNorm`."""


class FusedRmsNorm:
    """Mixed into the class of a norm, in front of it."""

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        (x,) = (*args, *kwargs.values())  # whatever the class calls it
        rule: RmsNorm = self.__dict__[RULE]
        return rms_norm(x, self.weight, rule)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as the norm it was, and converted again: the class itself exists in this process only."""
        attributes = {name: value for name, value in self.__dict__.items() if name not in (ORIGINAL, RULE)}
        return _rebuilt, (self.__dict__[ORIGINAL], tuple(self.__dict__[RULE]), attributes)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, rule: RmsNorm) -> torch.Tensor:
    """fp32 inside, the dtype of `x` out."""
    device = x.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        if x.dtype == weight.dtype and not rule.adds_one:
            return F.rms_norm(x, weight.shape, weight, rule.eps)
        scale = weight.float() + 1 if rule.adds_one else weight.float()
        return F.rms_norm(x.float(), weight.shape, scale, rule.eps).to(x.dtype)


@once_for_each
def fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The fused version of a class of norms."""
    return type(f"Fp8{original.__name__}", (FusedRmsNorm, original), {"__module__": __name__})


def convert(module: nn.Module) -> nn.Module:
    """Make a norm that `rms_norm_of` knows its fused version, in place."""
    rule = rms_norm_of(module)
    assert rule is not None, "the plan swaps only norms that it knows"
    return _take(module, rule)


def _take(module: nn.Module, rule: RmsNorm) -> nn.Module:
    module.__dict__[ORIGINAL], module.__dict__[RULE] = type(module), rule
    module.__class__ = fused_class(type(module))
    return module


def _rebuilt(original: type[nn.Module], rule: tuple[float, bool], attributes: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__.update(attributes)
    return _take(module, RmsNorm(*rule))
