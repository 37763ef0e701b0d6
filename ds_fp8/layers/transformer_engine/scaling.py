"""From our recipe to one of Transformer Engine's, with nothing swallowed on the way.

Transformer Engine 2.x accepts any argument of a recipe in silence, a typo too, and has dropped `interval` and
`override_linear_precision`. So it gets only what it honours, by names that were checked, and the rest is done by us:

    margin, interval, amax_history_len, amax_compute_algo, reduce_amax    the scale book (delayed scaling, one for all
                                                                          backends, so scales and checkpoints agree)
    override_linear_precision                                             `products.py`
    fp8_format, and the kind of scaling                                   Transformer Engine

Its own history is therefore one entry long: the slot where a cast leaves its amax.
"""

from __future__ import annotations

from typing import Any

from ...errors import BackendError
from ...recipe import Recipe
from .names import TransformerEngine, accepted

CLASSES = {
    "delayed": "DelayedScaling",
    "current": "Float8CurrentScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
    "nvfp4": "NVFP4BlockScaling",
}
"""Our recipe kind -> class in transformer_engine.common.recipe."""


def make_recipe(engine: TransformerEngine, recipe: Recipe) -> Any:
    """Transformer Engine's recipe object for `recipe`.

    Raises BackendError when this version does not know the kind, or the device does not run it.
    """
    name = CLASSES[recipe.kind]
    found = getattr(engine.recipe, name, None)
    if found is None:
        raise BackendError(
            f"fp8/recipe {recipe.kind}: Transformer Engine {engine.version} has no {name}.\n"
            "  Install a newer one, or use the recipe delayed."
        )
    available, reason = engine.availability(recipe.kind)
    if not available:
        raise BackendError(
            f"fp8/recipe {recipe.kind}: this device does not run it ({reason}).\n"
            "  Use delayed, current or block on Hopper; delayed or current on Ada."
        )
    if recipe.kind == "nvfp4":
        return found()
    arguments: dict[str, Any] = {"fp8_format": getattr(engine.recipe.Format, recipe.fp8_format)}
    if recipe.is_delayed:
        arguments |= {"amax_history_len": 1, "reduce_amax": False}
    unknown = sorted(set(arguments) - accepted(found))
    if unknown:
        raise BackendError(f"Transformer Engine {engine.version}: {name} does not take {', '.join(unknown)}.")
    return found(**arguments)
