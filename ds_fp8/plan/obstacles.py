"""Why a module cannot, or should not, be converted: one small function per reason.

Each takes a `Site` and returns the reason as the user will read it, or None. `HARD` obstacles make a conversion wrong
or impossible: asking for such a module by its full name is an error. `SOFT` ones are good defaults, and naming the
module overrules them. Each of these was a silent failure somewhere: subclasses whose forward is never called, tied
heads quietly untied, a conversion that stopped at the first unaligned layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .roles import Role

ALIGNMENT = {"delayed": 16, "current": 16, "block": 16, "mxfp8": 32, "nvfp4": 16}
"""in_features and out_features must be multiples of this: what FP8 GEMMs need, kept on every backend so that the same
model has the same FP8 layers on a laptop and on a GPU."""

KINDS: tuple[tuple[str, type[nn.Module]], ...] = (
    ("Linear", nn.Linear),
    ("LayerNorm", nn.LayerNorm),
    ("RMSNorm", nn.RMSNorm),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Site:
    """A module in its place.

    sharers  (fqn, module) of all modules that hold the same weight Parameter, this one included
    backend  the backend that will run it
    role     what it is for, where that is a reason to keep it (`roles.py`)
    """

    fqn: str
    module: nn.Module
    kind: str
    sharers: Sequence[tuple[str, nn.Module]]
    recipe: str
    backend: str
    role: Role | None = None

    @property
    def weight(self) -> torch.Tensor | None:
        return self.module._parameters.get("weight")


Obstacle = Callable[[Site], "str | None"]


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The whole shape: under `zero.Init` a parameter is empty until gathered, and carries its shape as `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def numel_of(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def kind_of(module: nn.Module) -> str | None:
    return next((kind for kind, cls in KINDS if isinstance(module, cls)), None)


def computed_weight(site: Site) -> str | None:
    """weight_norm, spectral_norm and parametrizations compute the weight anew in each forward: nothing to adopt."""
    if hasattr(site.module, "parametrizations"):
        return "its weight is parametrized"
    if site.kind == "Linear" and site.weight is None:
        return "its weight is computed by a hook (weight_norm or the like)"
    return None


def foreign_weight(site: Site) -> str | None:
    """A weight that is no plain dense floating Parameter belongs to somebody else's scheme."""
    weight = site.weight
    if weight is None:
        return None
    if weight.dtype not in DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.layout != torch.strided:
        return f"its weight is {str(weight.layout).removeprefix('torch.')}"
    if (
        type(weight) not in (nn.Parameter, nn.parameter.Buffer)
        and type(weight).__module__.partition(".")[0] != "deepspeed"
    ):
        return f"its weight is a {type(weight).__name__}"
    if isinstance(weight.data, torch.Tensor) and type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    return None


def replaced_forward(site: Site) -> str | None:
    """Somebody else's forward on the instance would be lost, or would bypass ours."""
    return "its forward was replaced on the instance" if "forward" in vars(site.module) else None


def subclass(site: Site) -> str | None:
    """A subclass has its own forward, or none that is ever called."""
    cls = type(site.module)
    if any(cls is plain for _, plain in KINDS):
        return None
    if cls.__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention never calls its out_proj"
    return f"subclass {cls.__name__}"


def unaligned(site: Site) -> str | None:
    """FP8 matrix products want multiples of 16."""
    if site.kind != "Linear" or site.weight is None:
        return None
    side = ALIGNMENT[site.recipe]
    wrong = [size for size in shape_of(site.weight) if size % side]
    if 0 in shape_of(site.weight):
        return "empty"
    return f"not a multiple of {side}: {', '.join(map(str, wrong))}" if wrong else None


def norm_shape(site: Site) -> str | None:
    """Transformer Engine's norms always have a weight, LayerNorm a bias, over one dimension; one rule for both backends."""
    if site.kind == "Linear":
        return None
    if site.weight is None:
        return "no affine weight"
    if site.kind == "LayerNorm" and site.module._parameters.get("bias") is None:
        return "no bias"
    if len(shape_of(site.weight)) > 1:
        return "normalizes over several dimensions"
    if site.kind == "RMSNorm" and site.backend == "transformer_engine" and site.module.eps is None:
        return "eps is None, Transformer Engine wants a number"
    return None


def tied(site: Site) -> str | None:
    """An embedding reads the same Parameter in high precision, and a tied head is what quality depends on most."""
    if site.kind != "Linear":
        return None
    others = [(fqn, module) for fqn, module in site.sharers if kind_of(module) != "Linear"]
    if not others:
        return None
    fqn, module = others[0]
    return f"tied to {fqn} ({type(module).__name__})"


HARD: tuple[Obstacle, ...] = (computed_weight, foreign_weight, replaced_forward, unaligned, norm_shape)
SOFT: tuple[Obstacle, ...] = (subclass, tied)


def first_reason(obstacles: Sequence[Obstacle], site: Site) -> str | None:
    return next((reason for reason in (obstacle(site) for obstacle in obstacles) if reason), None)
