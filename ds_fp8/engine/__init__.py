"""Activation: JSON, plan, layers, communication and optimizer put into DeepSpeed's engine.

`activate()` wraps three methods of `DeepSpeedEngine` that run while an engine is built (`patches.py`). In an engine
without an `fp8` or `msamp` section they do no more than DeepSpeed's own, but for a word in the process group's store
(`startup_check.py`). In one that has a section, it is read, planned and compared with all ranks (`agreement.py`), the
layers are swapped, and an `Attachment` stays on the engine (`attach.py`).

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
