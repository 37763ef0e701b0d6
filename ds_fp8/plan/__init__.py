"""The decision: settings and the model become one frozen, printable `Plan`; the stations obey it."""

from __future__ import annotations

from .decisions import CommPlan, Fp8Plan, ModuleDecision, OptimPlan, ParameterDecision, Plan
from .estimate import Estimate, estimate, gemm_share
from .make import make_plan

__all__ = [
    "CommPlan",
    "Estimate",
    "Fp8Plan",
    "ModuleDecision",
    "OptimPlan",
    "ParameterDecision",
    "Plan",
    "estimate",
    "gemm_share",
    "make_plan",
]
