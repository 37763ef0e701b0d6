"""The recipes, one file each: how the operands of the three products are cast, and who else must know of it.

    base                      what a recipe says, and what holds for most of them
    delayed, current, block   ours, and Transformer Engine's
    rowwise                   ours alone
    mxfp8, nvfp4              Transformer Engine's alone
    owner                     casts of a part of a weight by the rank that owns it (O3)

A recipe is an object without state. What one remembers from step to step lies in the FP8 state; what a job has set
(margin, formats) in the `Recipe` of its plan. The file's name is the recipe's name in the JSON; `ds_fp8/recipe.py` has
its other facts.
"""

from __future__ import annotations

import functools
from importlib import import_module

from .base import Scaling


@functools.cache
def scaling_of(kind: str) -> Scaling:
    """The recipe of this name, one of `ds_fp8.recipe.RECIPES`."""
    found: Scaling = import_module(f".{kind}", __package__).SCALING
    return found


__all__ = ["Scaling", "scaling_of"]
