"""Constructors of DeepSpeedEngine's subclasses: PipelineEngine's, the hybrid engine's, a script's own.

They go on when the base's has done its work, and may fail there (ZeRO 2 with a pipeline, a data set). So each that is
defined is wrapped as the base's is: those of the classes that are there, and of later ones when they are defined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_wrapped: list[tuple[type, Callable]] = []
_watched: list[type] = []


def wrap(engine_class: type, wrapper: Callable[[Callable], Callable], mark: str) -> None:
    """Put `wrapper(own)` in the place of every subclass' own `__init__`.

    mark  attribute of what is wrapped already
    """

    def wrap_one(subclass: type) -> None:
        own = vars(subclass).get("__init__")
        if own is not None and not hasattr(own, mark):
            _wrapped.append((subclass, own))
            setattr(subclass, "__init__", wrapper(own))  # noqa: B010  mypy takes the assignment for a mistake

    def init_subclass(cls: type, **arguments: Any) -> None:
        super(engine_class, cls).__init_subclass__(**arguments)  # type: ignore[arg-type,misc]
        wrap_one(cls)

    if "__init_subclass__" not in vars(engine_class):
        setattr(engine_class, "__init_subclass__", classmethod(init_subclass))  # noqa: B010
        _watched.append(engine_class)
    waiting: list[type] = list(engine_class.__subclasses__())
    while waiting:
        subclass = waiting.pop()
        wrap_one(subclass)
        waiting += subclass.__subclasses__()


def restore() -> None:
    """The very functions that were there."""
    for subclass, own in _wrapped:
        setattr(subclass, "__init__", own)  # noqa: B010
    for engine_class in _watched:
        delattr(engine_class, "__init_subclass__")
    _wrapped.clear()
    _watched.clear()
