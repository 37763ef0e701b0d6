"""Activation: JSON, plan, layers, communication and optimizer put into DeepSpeed's engine.

`activate()` wraps two methods of `DeepSpeedEngine` (`patches.py`); each wrapper asks at once whether this engine has
an `fp8` or `msamp` section and, if not, calls the original and nothing else. The first wrapper that meets a section
reads it, plans, swaps (`attach.py`), compares with all ranks (`agreement.py`), and leaves an `Attachment` on the
engine.

Heavy packages are imported only then. The plugin makes the import of DeepSpeed a few milliseconds longer.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from . import patches

if TYPE_CHECKING:
    from .attach import Attachment

ATTRIBUTE = "ds_fp8"
"""Name under which the Attachment lies on a DeepSpeed engine."""


def activate() -> None:
    """Hook DeepSpeed's engine class (imports DeepSpeed). Twice is the same as once."""
    patches.install()


def deactivate() -> None:
    """Give the engine class its own methods back. Engines that are attached already keep their FP8 layers."""
    patches.restore()
    if "ds_fp8.engine.merging" in sys.modules:
        from . import merging

        merging.restore()


def is_active() -> bool:
    return patches.is_installed()


def of(deepspeed_engine: Any) -> Attachment | None:
    """What ds_fp8 did to this engine: settings, plan, FP8 state; None for an engine without our sections."""
    return deepspeed_engine.__dict__.get(ATTRIBUTE)
