"""Settings and the model become one frozen, printable `Plan`; layers, communication and optimizer follow it."""

from __future__ import annotations

from .decisions import CommPlan, Fp8Plan, ModuleDecision, OptimPlan, ParameterDecision, Plan, ProductDecision
from .estimate import Estimate, estimate
from .make import make_plan
from .share import flops_share, share_line

__all__ = [
    "CommPlan",
    "Estimate",
    "Fp8Plan",
    "ModuleDecision",
    "OptimPlan",
    "ParameterDecision",
    "Plan",
    "ProductDecision",
    "estimate",
    "flops_share",
    "make_plan",
    "share_line",
]
