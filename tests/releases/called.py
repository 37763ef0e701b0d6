"""Which of our overrides of DeepSpeed's methods were called? Counting wrappers, put around them before any engine is
made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from ds_fp8.zero import specializing
from ds_fp8.zero.states_stage0 import Stage0Optimizer

NOT_HERE = {
    "Stage0Optimizer.backward",  # called by the engine of 0.18.2 and before
    "StatesStage12.offload_states",  # refuses
    "StatesStage3.offload_states",
}


def overrides() -> Iterator[tuple[type, str]]:
    """(our class, name) of every method that stands in front of one of DeepSpeed's."""
    rows = [(row.wrapper, kind) for row in specializing.SERVED for kind in (row.states, row.gradients, row.weights)]
    for wrapper, mixin in [*rows, (FP16_UnfusedOptimizer, Stage0Optimizer)]:
        for cls in [] if mixin is None else mixin.__mro__:
            for name, value in vars(cls).items():
                if callable(value) and name != "__init__" and hasattr(wrapper, name) and cls is not object:
                    yield cls, name


def watch() -> Callable[[], set[str]]:
    """Wrap all of them; the function returned names those that were not called since."""
    waiting: set[str] = set()
    for cls, name in {(cls, name) for cls, name in overrides()}:
        label = f"{cls.__name__}.{name}"
        if label not in NOT_HERE and cls.__module__.startswith("ds_fp8"):
            waiting.add(label)
            setattr(cls, name, _noting(getattr(cls, name), label, waiting))
    return lambda: waiting


def _noting(method: Any, label: str, waiting: set[str]) -> Any:
    @functools.wraps(method)
    def noting(*args: Any, **kwargs: Any) -> Any:
        waiting.discard(label)
        return method(*args, **kwargs)

    return noting
