"""RMS norms that are no `nn.RMSNorm`, known by what they do: `LlamaRMSNorm`, `Qwen3RMSNorm`, `T5LayerNorm`, Gemma's and
their like.

Every model of transformers brings a class of its own, written out in some six operations. A module is one of them if it
has one Parameter `weight` of one dimension and nothing else, a small number for eps, and if its forward gives what RMS
norm gives, on typical rows and on rows so small that eps decides:

    y = x / sqrt(mean(x * x) + eps) * weight           Llama, Qwen, Mistral, T5
    y = x / sqrt(mean(x * x) + eps) * (1 + weight)     Gemma

The forward that is asked is the class's, on a copy of the module with another weight: no hook runs, nothing is changed.
One that takes more than a tensor (`gate=None` of Mamba's norms) is another layer.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .shapes import own_parameter, shape_of

EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
"""Attributes in which such a class keeps its eps."""

ROWS = 3

_EVERY_MODULES = frozenset(vars(nn.Module()))

_known: dict[tuple[Any, ...], RmsNorm | None] = {}


class RmsNorm(NamedTuple):
    """eps, and whether 1 is added to the weight."""

    eps: float
    adds_one: bool


def rms_norm_of(module: nn.Module) -> RmsNorm | None:
    """What kind of RMS norm `module` is; None for everything else, and for `nn.RMSNorm` itself."""
    weight = own_parameter(module, "weight")
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    if weight is None or not alone or isinstance(module, nn.RMSNorm) or not weight.is_floating_point():
        return None
    shape = shape_of(weight)
    eps = next((found for found in (vars(module).get(name) for name in EPS) if isinstance(found, float)), None)
    if eps is None or len(shape) != 1 or not 0 < eps < 0.1:
        return None
    if "forward" in vars(module) or len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    others = [(name, repr(value)) for name, value in vars(module).items() if name not in _EVERY_MODULES]
    key = type(module), shape[0], *others  # a size of groups counts, and whatever else the forward may read
    if key not in _known:
        _known[key] = next(
            (rule for one in (False, True) if _computes(module, rule := RmsNorm(eps, one), shape[0])), None
        )
    return _known[key]


def _computes(module: nn.Module, rule: RmsNorm, size: int) -> bool:
    """Whether the forward of `module` is `rule`, in fp32 to its rounding; and keeps the dtype of a bf16 input."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(ROWS, size, generator=generator, dtype=torch.float32, device="cpu")
    weight = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu") + 0.5
    scale = weight + 1 if rule.adds_one else weight
    try:
        for x in (rows, rows * rule.eps**0.5):
            wanted = F.rms_norm(x, (size,), scale, rule.eps)
            if not torch.allclose(_forward(module, weight, x), wanted, rtol=1e-4, atol=1e-5):
                return False
        return _forward(module, weight.bfloat16(), rows.bfloat16()).dtype == torch.bfloat16
    except Exception:  # noqa: BLE001 - a forward that wants something else is another layer
        return False


def _forward(module: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    probe: Any = copy.copy(module)
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return type(module).forward(probe, x)
