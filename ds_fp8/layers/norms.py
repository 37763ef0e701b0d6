"""Norms compute in high precision: statistics in fp32, the result in the dtype of the input.

That is what Transformer Engine's te.LayerNorm and te.RMSNorm do, and where they differ from torch: under autocast
nn.LayerNorm returns fp32, which the next linear layer casts down again; and a 16-bit input with fp32 weights is refused
by some devices. Without autocast, and with one dtype, an Fp8LayerNorm computes exactly what nn.LayerNorm does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import fused_rms_norm
from .as_original import HOME, ORIGINAL, refuse_script
from .fused_rms_norm import fused_class


class Fp8LayerNorm(nn.LayerNorm):
    """LayerNorm beside FP8 layers."""

    __prepare_scriptable__ = refuse_script

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            if input.dtype == self.weight.dtype:
                return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
            bias = self.bias.float() if self.bias is not None else None
            out = F.layer_norm(input.float(), self.normalized_shape, self.weight.float(), bias, self.eps)
            return out.to(input.dtype)


class Fp8RMSNorm(nn.RMSNorm):
    """RMSNorm beside FP8 layers."""

    __prepare_scriptable__ = refuse_script

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if x.dtype == self.weight.dtype:
                return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
            return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), eps).to(x.dtype)


CLASSES: dict[str, type[Any]] = {"LayerNorm": Fp8LayerNorm, "RMSNorm": Fp8RMSNorm}


def is_library(module: nn.Module) -> bool:
    """A norm of a model library: torch's kernel runs it beside either backend's layers."""
    return not isinstance(module, (nn.LayerNorm, nn.RMSNorm))


def convert(module: nn.Module, kind: str) -> nn.Module:
    """Turn a norm into ours, in place."""
    if is_library(module):
        return fused_rms_norm.convert(module)
    module.__dict__[ORIGINAL] = type(module)
    module.__class__ = CLASSES[kind]
    return module


def restore(module: nn.Module) -> nn.Module:
    """The unmodified norm again, in place."""
    module.__class__ = module.__dict__.pop(ORIGINAL)
    module.__dict__.pop(fused_rms_norm.RULE, None)
    module.__dict__.pop(HOME, None)
    return module


def form_of(original: type[nn.Module]) -> type[nn.Module]:
    """The class that a norm of class `original` gets."""
    return next((cls for cls in CLASSES.values() if issubclass(original, cls.__bases__)), None) or fused_class(original)
