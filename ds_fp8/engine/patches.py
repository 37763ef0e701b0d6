"""The wrappers around DeepSpeedEngine's methods, and how they come and go.

Methods of the class are replaced, not names of modules: whoever imported `DeepSpeedEngine` or `deepspeed.initialize`
before us (Accelerate, the HF Trainer) meets the wrapper all the same, and PipelineEngine and the hybrid engine inherit
it. Both run while an engine is being built. What an attached engine needs later (step, checkpoints) hangs on that
one engine (`Attachment.hook`), so `deactivate()` never leaves a running engine half plugged, and an engine without our
sections runs DeepSpeed's own code in every step.

When DeepSpeed lacks one of the two there is nothing to hang on to, so the constructor is guarded instead: a job
that asks for FP8 is refused, every other job runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_originals: dict[str, Callable] = {}


def _configure_distributed_model(original: Callable, engine: Any, model: Any) -> Any:
    from .sections import sections_of

    attachment = None
    if sections_of(engine.config):
        from .attach import attach

        attachment = attach(engine, model)
    else:
        from .roll_call import pass_by

        pass_by()
    original(engine, model)
    if attachment is not None:
        attachment.placed()


def _configure_optimizer(original: Callable, engine: Any, client_optimizer: Any, model_parameters: Any) -> Any:
    from . import of

    attachment = of(engine)
    if attachment is None:
        return original(engine, client_optimizer, model_parameters)
    return attachment.configure_optimizer(original, client_optimizer, model_parameters)


WRAPPERS: dict[str, Callable] = {
    "_configure_distributed_model": _configure_distributed_model,
    "_configure_optimizer": _configure_optimizer,
}


def _guarded_init(original: Callable, engine: Any, *args: Any, **kwargs: Any) -> None:
    """Used only when a method of WRAPPERS is missing: a job with our sections cannot run here."""
    from .sections import sections_of

    if any(sections_of(argument) for argument in (*args, *kwargs.values()) if isinstance(argument, dict)):
        from ..zero import seams

        seams.verify()
    original(engine, *args, **kwargs)


def install() -> None:
    """Wrap the methods of DeepSpeedEngine; nothing happens when they are wrapped already."""
    if _originals:
        return
    from deepspeed.runtime.engine import DeepSpeedEngine

    complete = all(hasattr(DeepSpeedEngine, name) for name in WRAPPERS)
    for name, wrapper in (WRAPPERS if complete else {"__init__": _guarded_init}).items():
        original = getattr(DeepSpeedEngine, name)
        _originals[name] = original
        setattr(DeepSpeedEngine, name, _method(wrapper, original))


def _method(wrapper: Callable, original: Callable) -> Callable:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    return method


def restore() -> None:
    """Undo `install`, leaving the very same function objects that DeepSpeed defined."""
    if not _originals:
        return
    from deepspeed.runtime.engine import DeepSpeedEngine

    for name, original in _originals.items():
        setattr(DeepSpeedEngine, name, original)
    _originals.clear()


def is_installed() -> bool:
    return bool(_originals)
