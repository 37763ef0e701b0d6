"""The JSON becomes settings: read as DeepSpeed reads it, validated against `schemas/`, all problems reported at once.

    load(source) -> Settings         for a job; raises ConfigError
    check(source) -> list[Problem]   for people; raises nothing

Neither torch nor deepspeed is imported here, so a check answers before a node is spent. Names are fetched at first use
(PEP 562): `sections` is asked about every DeepSpeed job, also those without FP8, and must not bring a parser along.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import check, check_document, load, load_document
    from .settings import (
        CompileSettings,
        DeepSpeedFacts,
        Fp8Settings,
        LayerSettings,
        MsampSettings,
        Settings,
        TelemetrySettings,
    )
    from .source import Document, parse, read

__all__ = [
    "CompileSettings",
    "DeepSpeedFacts",
    "Document",
    "Fp8Settings",
    "LayerSettings",
    "MsampSettings",
    "Settings",
    "TelemetrySettings",
    "check",
    "check_document",
    "load",
    "load_document",
    "parse",
    "read",
]


_HOMES = {
    **dict.fromkeys(("check", "check_document", "load", "load_document"), "loading"),
    **dict.fromkeys(("Document", "parse", "read"), "source"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "settings")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
