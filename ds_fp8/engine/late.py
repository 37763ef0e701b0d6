"""Engines that were built before the plugin was imported train without FP8, so the job is stopped.

Asked only when DeepSpeed's engine class was imported past the activation hook: at most once in a process. DeepSpeed
keeps no list of its engines; Python's garbage collector knows them as instances of the class.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from ..errors import ConfigError, DsFp8Error
from ..zero.touched import touched
from . import of
from .sections import sections_of

TOUCHED = {
    "Engine": touched(reads="config"),
}


def refuse_engines_without_us(engine_class: type) -> None:
    """Raises DsFp8Error, and says so on stderr, when an engine with our sections exists that we did not attach to."""
    for engine in gc.get_objects():
        if issubclass(type(engine), engine_class):
            refuse(engine)


def refuse(engine: Any) -> None:
    """The same for one engine."""
    if not _is_asked_for(engine):
        return
    message = (
        "a DeepSpeed engine whose JSON has our sections was built before ds_fp8 was activated: it would train without "
        "them.\n"
        "  Put `import ds_fp8` at the head of the script; `ds_fp8 doctor ds.json --client ...` tells why the installed "
        "hook was not met."
    )
    # This error leaves from an import that somebody else makes, perhaps in a `try`.
    print(f"ds_fp8: error: {message}", file=sys.stderr, flush=True)
    raise DsFp8Error(message)


def _is_asked_for(engine: Any) -> bool:
    """Whether this engine is past the method that attaches, was not attached, and its JSON asks for it."""
    if of(engine) is not None or "module" not in engine.__dict__ or not sections_of(engine.__dict__.get("config")):
        return False
    from .. import config

    try:
        return config.load(engine.config).enabled
    except ConfigError:
        return True
