"""Why a module cannot, or should not, be converted: one small function per reason.

Each takes a `CandidateModule` and returns the reason as the user will read it, or None. Where a `HARD` check fails, a
conversion would be wrong or impossible: asking for such a module by its full name is an error. `SOFT` ones are good
defaults, and naming the module overrules them. Each check stands for a silent failure that has happened: subclasses
whose forward was never called, tied heads that were untied, a conversion that stopped at the first unaligned layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..recipe import RECIPE_KINDS
from .expert_rules import rule_of
from .known_norms import rms_norm_of
from .shapes import DENSE, LAYER_TYPES, is_around_another, layer_type, own_parameter, shape_of

if TYPE_CHECKING:
    from .roles import Role

KNOWN: tuple[tuple[str, type[nn.Module]], ...] = (
    ("Linear", nn.Linear),
    ("LayerNorm", nn.LayerNorm),
    ("RMSNorm", nn.RMSNorm),
)
"""Kinds that are a class of torch. Other layers (`shapes.LAYER_TYPES`) and Experts ([experts, ., .] parameters) are
known
by their structure, RMS norms of model libraries by what they compute (`known_norms.py`)."""

MATRICES = (*DENSE, "Experts")
"""Kinds that multiply with weights: `fp8/layers/linear` is about them."""

APART = (*LAYER_TYPES, "Experts")
"""Kinds that are ours with either backend."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CandidateModule:
    """A module in its place.

    sharers  (fqn, module) of all modules that hold the same weight Parameter, this one included
    backend  the backend that will run it
    role     what it is for, where that is a reason to keep it (`roles.py`)
    casts    DeepSpeed will cast the weight to 16 bits before the first step, fp64 too
    """

    fqn: str
    module: nn.Module
    kind: str
    sharers: Sequence[tuple[str, nn.Module]]
    recipe: str
    backend: str
    role: Role | None = None
    casts: bool = False

    @property
    def weight(self) -> torch.Tensor | None:
        """The weight; of experts the one that is used first."""
        rule = rule_of(self.module) if self.kind == "Experts" else None
        return own_parameter(self.module, rule.weights[0] if rule else "weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of a dense layer, (experts, out, in) of experts' first weight, the normalized shape of a norm."""
        if self.kind == "Experts":
            rule = rule_of(self.module)
            return rule.shapes(self.module)[0] if rule else ()
        shape = shape_of(self.weight) if self.weight is not None else ()
        return shape[::-1] if self.kind in LAYER_TYPES and LAYER_TYPES[self.kind].transposed else shape


ConversionCheck = Callable[[CandidateModule], "str | None"]


def kind_of(module: nn.Module, *, library_norms: bool = False) -> str | None:
    found = layer_type(module) or next((kind for kind, cls in KNOWN if isinstance(module, cls)), None)
    if found is None and library_norms and rms_norm_of(module) is not None:
        return "RMSNorm"
    return "Experts" if found is None and rule_of(module) is not None else found


def computed_weight(candidate: CandidateModule) -> str | None:
    """weight_norm, spectral_norm and parametrizations compute the weight anew in each forward, and adapters that are a
    Linear have none: nothing to convert.
    """
    if hasattr(candidate.module, "parametrizations"):
        return "its weight is parametrized"
    if is_around_another(candidate.module):
        return "it has no weight of its own, base_layer inside multiplies"
    if candidate.kind in MATRICES and candidate.weight is None:
        return "its weight is computed by a hook (weight_norm or the like)"
    return None


def foreign_weight(candidate: CandidateModule) -> str | None:
    """A weight that is no dense floating Parameter belongs to somebody else's scheme."""
    weight = candidate.weight
    if weight is None:
        return None
    if weight.dtype not in DTYPES and not (candidate.casts and weight.dtype == torch.float64):
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


def replaced_forward(candidate: CandidateModule) -> str | None:
    """Somebody else's forward on the instance would be lost, or would bypass ours."""
    return "its forward was replaced on the instance" if "forward" in vars(candidate.module) else None


def subclass(candidate: CandidateModule) -> str | None:
    """A subclass has its own forward, or none that is ever called."""
    cls = type(candidate.module)
    if candidate.kind in APART or any(cls is known for _, known in KNOWN):
        return None
    if not isinstance(candidate.module, tuple(known for _, known in KNOWN)):
        return None  # known by what it computes
    if cls.__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention never calls its out_proj"
    return f"subclass {cls.__name__}"


def unaligned(candidate: CandidateModule) -> str | None:
    """FP8 matrix products want multiples of 16."""
    if candidate.kind not in MATRICES or candidate.weight is None:
        return None
    side, sizes = RECIPE_KINDS[candidate.recipe].alignment, list(candidate.shape)
    if candidate.kind == "Experts" and (rule := rule_of(candidate.module)):
        sizes = list(dict.fromkeys(size for shape in rule.shapes(candidate.module) for size in shape[1:]))
    wrong = [size for size in sizes if size % side]
    if 0 in sizes:
        return "empty"
    return f"not a multiple of {side}: {', '.join(map(str, wrong))}" if wrong else None


def norm_shape(candidate: CandidateModule) -> str | None:
    """Transformer Engine's norms always have a weight, LayerNorm a bias, over one dimension; one rule for both
    backends.
    """
    if candidate.kind in MATRICES:
        return None
    if candidate.weight is None:
        return "no affine weight"
    if candidate.kind == "LayerNorm" and own_parameter(candidate.module, "bias") is None:
        return "no bias"
    if len(shape_of(candidate.weight)) > 1:
        return "normalizes over several dimensions"
    if not isinstance(candidate.module, (nn.LayerNorm, nn.RMSNorm)):
        return None  # a model library's: torch's kernel runs it beside either backend
    if candidate.kind == "RMSNorm" and candidate.backend == "transformer_engine" and candidate.module.eps is None:
        return "eps is None, Transformer Engine wants a number"
    return None


def tied(candidate: CandidateModule) -> str | None:
    """An embedding reads the same Parameter in high precision, and a tied head is what quality depends on most."""
    if candidate.kind not in MATRICES:
        return None
    others = [(fqn, module) for fqn, module in candidate.sharers if kind_of(module) != candidate.kind]
    if not others:
        return None
    fqn, module = others[0]
    return f"tied to {fqn} ({type(module).__name__})"


def not_in_recipe(candidate: CandidateModule) -> str | None:
    """Blackwell's recipes live in Transformer Engine, which has no layer for them."""
    if candidate.kind in APART and not RECIPE_KINDS[candidate.recipe].is_ours:
        return f"recipe {candidate.recipe} has no product for a {candidate.kind}"
    return None


HARD: tuple[ConversionCheck, ...] = (
    computed_weight,
    foreign_weight,
    replaced_forward,
    not_in_recipe,
    unaligned,
    norm_shape,
)
SOFT: tuple[ConversionCheck, ...] = (subclass, tied)


def first_reason(checks: Sequence[ConversionCheck], candidate: CandidateModule) -> str | None:
    return next((reason for reason in (check(candidate) for check in checks) if reason), None)
