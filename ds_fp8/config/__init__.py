"""The JSON becomes settings: read as DeepSpeed reads it, validated against `schemas/`, all problems told at once.

    load(source) -> Settings         for a job; raises ConfigError
    check(source) -> list[Problem]   for people; raises nothing

Neither torch nor deepspeed is imported here, so a check answers before a node is spent. Names are fetched at first use
(PEP 562): `sections` is asked about every DeepSpeed job, also those without FP8, and must not bring a parser along.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "loading" if name in ("check", "load") else "settings"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
