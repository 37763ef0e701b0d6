"""From our recipe to one of Transformer Engine's, with nothing swallowed on the way.

Transformer Engine 2.x accepts any argument of a recipe in silence, a typo too, and has dropped `interval` and
`override_linear_precision`. So it gets only what it honours, by names that were checked, and the rest is done by us:

    margin, interval, amax_history_len, amax_compute_algo, reduce_amax    the FP8 state (delayed scaling, one for all
                                                                          backends, so scales and checkpoints agree)
    override_linear_precision                                             `products.py`
    fp8_format, and the kind of scaling                                   Transformer Engine

Its own history is therefore one entry long: the slot where a cast leaves its amax.
"""

from __future__ import annotations

from typing import Any

from ...errors import BackendError
from ...recipe import Recipe
from ..recipes import scaling_of
from .names import TransformerEngine, accepted


def make_recipe(engine: TransformerEngine, recipe: Recipe) -> Any:
    """Transformer Engine's recipe object for `recipe`.

    Raises BackendError when this version does not know the kind, or the device does not run it.
    """
    scaling = scaling_of(recipe.kind)
    name = scaling.te_class
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
    arguments = scaling.te_arguments(engine.recipe.Format, recipe)
    unknown = sorted(set(arguments) - accepted(found))
    if unknown:
        raise BackendError(f"Transformer Engine {engine.version}: {name} does not take {', '.join(unknown)}.")
    return found(**arguments)
