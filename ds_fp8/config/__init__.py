"""The JSON becomes settings: read as DeepSpeed reads it, validated against `schemas/`, all problems told at once.

    load(source) -> Settings         for a job; raises ConfigError
    check(source) -> list[Problem]   for people; raises nothing

Neither torch nor deepspeed is imported here, so a check answers before a node is spent.
"""

from __future__ import annotations

from .loading import check, load
from .settings import (
    DeepSpeedFacts,
    Fp8Settings,
    LayerSettings,
    MsampSettings,
    Settings,
    TelemetrySettings,
)

__all__ = [
    "DeepSpeedFacts",
    "Fp8Settings",
    "LayerSettings",
    "MsampSettings",
    "Settings",
    "TelemetrySettings",
    "check",
    "load",
]
