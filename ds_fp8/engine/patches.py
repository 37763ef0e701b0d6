"""The wrappers around DeepSpeedEngine's methods: how they are installed and removed.

Methods of the class are replaced, not names of modules: whoever imported `DeepSpeedEngine` or `deepspeed.initialize`
before us (Accelerate, the HF Trainer) meets the wrapper all the same, and PipelineEngine and the hybrid engine inherit
it; constructors of subclasses are wrapped as the base's is (`constructors.py`). They run while an engine is being
built. What an attached engine needs later (step, checkpoints) hangs on that one engine (`Attachment.hook`), so
`deactivate()` leaves running engines complete, and an engine without our sections runs DeepSpeed's own code in every
step.

When DeepSpeed lacks one of them, another wrapper of the constructor stands alone: a job that asks for FP8 is refused,
every other job runs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from ..zero.touched import touched
from . import constructors

TOUCHED = {
    "Engine": touched(overrides="_configure_distributed_model _configure_optimizer", reads="config"),
}

ORIGINAL = "ds_fp8_original"
"""Attribute of a wrapper: the function that DeepSpeed defined."""

BUILDING = "ds_fp8_building"
"""Set on an engine while its constructor runs."""

MET = "ds_fp8_met"
"""Set on an engine whose JSON we have been asked about."""

_originals: dict[str, Callable] = {}
_engine_class: type | None = None
_lock = threading.Lock()


def _configure_distributed_model(original: Callable, engine: Any, model: Any) -> Any:
    from .life import unmodified
    from .sections import sections_of

    engine.__dict__[MET] = True
    attachment, plans = None, bool(sections_of(engine.config))
    if plans:
        from .unbuilt import note

        note(engine, model)
    with unmodified(model, plans=plans):
        if plans:
            from .attach import attach

            attachment = attach(engine, model)
        else:
            from .startup_check import pass_by

            pass_by()
    original(engine, model)
    if attachment is not None:
        attachment.placed()


def _configure_optimizer(original: Callable, engine: Any, client_optimizer: Any, model_parameters: Any) -> Any:
    from . import of

    attachment = of(engine)
    if attachment is None:
        if MET not in engine.__dict__:  # hooked while this engine was being built
            from .late import refuse

            refuse(engine)
        return original(engine, client_optimizer, model_parameters)
    return attachment.configure_optimizer(original, client_optimizer, model_parameters)


def _init(original: Callable, engine: Any, *args: Any, **kwargs: Any) -> None:
    """Whatever ends the constructor, ours or the user's own: the model is as it was, and may be tried again. The
    constructor of a subclass calls its base's: the outermost decides.
    """
    if BUILDING in engine.__dict__:
        original(engine, *args, **kwargs)
        return
    engine.__dict__[BUILDING] = True
    try:
        original(engine, *args, **kwargs)
    except BaseException:
        from .unbuilt import undo

        undo(engine)
        raise
    finally:
        engine.__dict__.pop(BUILDING, None)
    from .unbuilt import built

    built(engine)


WRAPPERS: dict[str, Callable] = {
    "__init__": _init,
    "_configure_distributed_model": _configure_distributed_model,
    "_configure_optimizer": _configure_optimizer,
}


def _guarded_init(original: Callable, engine: Any, *args: Any, **kwargs: Any) -> None:
    """Used only when a method of WRAPPERS is missing: a job with our sections cannot run here."""
    from .sections import sections_of

    if any(sections_of(argument) for argument in (*args, *kwargs.values()) if isinstance(argument, dict)):
        from ..zero import private_names

        private_names.verify()
    original(engine, *args, **kwargs)


def install(engine_class: type | None = None) -> bool:
    """Wrap the methods of DeepSpeed's engine class; False, and nothing happens, when they are wrapped already.

    engine_class  None for the one of the DeepSpeed that is imported; a reload of its module makes a new one
    """
    global _engine_class
    if engine_class is None:
        from deepspeed.runtime.engine import DeepSpeedEngine

        engine_class = DeepSpeedEngine
    with _lock:
        if engine_class is _engine_class:
            return False
        _engine_class = engine_class
        _originals.clear()
        complete = all(hasattr(engine_class, name) for name in WRAPPERS)
        for name, wrapper in (WRAPPERS if complete else {"__init__": _guarded_init}).items():
            found = getattr(engine_class, name)
            original = getattr(found, ORIGINAL, found)  # this module may have been reloaded: never wrap a wrapper
            _originals[name] = original
            setattr(engine_class, name, _method(wrapper, original))
        if complete:
            constructors.wrap(engine_class, functools.partial(_method, _init), ORIGINAL)
    return True


def _method(wrapper: Callable, original: Callable) -> Callable:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(method, ORIGINAL, original)
    return method


def restore() -> None:
    """Undo `install`, leaving the very same function objects that DeepSpeed defined."""
    global _engine_class
    with _lock:
        for name, original in _originals.items():
            setattr(_engine_class, name, original)
        _originals.clear()
        constructors.restore()
        _engine_class = None


def is_installed() -> bool:
    return bool(_originals)
