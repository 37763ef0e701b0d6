"""An engine whose constructor ends by an exception leaves its model as it was: a script may mend its JSON, its
scheduler or its data and call `deepspeed.initialize` again.

A scheduler or a data set that raises, a monitor that is not installed, Ctrl-C: the layers are swapped by then and, in
ZeRO 3, DeepSpeed's hooks hang on the model and look for an engine that nobody has. Nothing communicates, for the error
may be this rank's alone. What was done to the parameters stays: DeepSpeed's cast to 16 bits and ZeRO 3's partitions,
which its next engine takes as they are, and the rounding of frozen weights that were kept in FP8 already, which the
same JSON makes again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..zero.touched import touched
from . import life, of

TOUCHED = {
    "Engine": touched(reads="destroy optimizer"),
}

BEFORE = "_ds_fp8_before"
"""On an engine with our sections while it is being built: what hung on its model before."""


def note(engine: Any, model: Any) -> None:
    """The engine with our sections is about to change `model`."""
    engine.__dict__[BEFORE] = (model, {key for hooks in _hooks(model) for key in hooks})


def built(engine: Any) -> None:
    """It came into being."""
    engine.__dict__.pop(BEFORE, None)


def undo(engine: Any) -> None:
    """It did not. Never raises: the exception under way is the one to be seen. Each part is tried, whatever became of
    the others.
    """
    model, hooks = engine.__dict__.pop(BEFORE, (None, set()))
    if model is None:
        return
    attachment = of(engine)
    if attachment is not None:
        _tried(lambda: attachment.detach(communicate=False))
    _tried(lambda: life.restore_leftovers(model))
    optimizer = getattr(engine, "optimizer", None)
    if optimizer is not None and hasattr(optimizer, "destroy"):  # torch's own have none
        _tried(optimizer.destroy)
    _tried(lambda: _remove_hooks(model, hooks))


def _remove_hooks(model: Any, kept: set[int]) -> None:
    for hooks in _hooks(model):
        for key in [key for key in hooks if key not in kept]:
            del hooks[key]


def _hooks(model: Any) -> Iterator[dict[int, Any]]:
    """Every table of hooks of modules and parameters. torch numbers hooks through the whole process."""
    tables = [name for name in vars(nn.Module()) if "_hooks" in name]
    for module in model.modules():
        yield from (vars(module)[name] for name in tables if name in vars(module))
    for parameter in model.parameters():
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
        if hooks is not None:
            yield hooks


def _tried(part: Callable[[], Any]) -> None:
    try:
        part()
    except Exception as error:  # noqa: BLE001  beside the user's own
        print(
            f"ds_fp8: the model could not be given back entirely: {type(error).__name__}: {error}\n"
            "  Build it anew before the next deepspeed.initialize.",
            file=sys.stderr,
            flush=True,
        )
