"""Rules that need more than one key: one tiny function per rule, all of one signature, each yielding problems.

A rule takes the whole configuration, which has passed the schema, and yields `(path, message)`; it knows nothing of
files and lines. A rule refuses what would be ignored or would compute something else than was asked for; what depends
on the model or the device is refused by the plan instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..algorithms import moments_of
from ..levels import ABSENT, LEVELS, MASTERS
from ..recipe import HISTORY_RECIPES, RECIPE_KINDS, listed
from . import contract
from .facts import optimizer_type
from .positions import Path
from .resolve import LEVEL_KEYS, explicit_keys, is_enabled, value_of

Found = Iterator[tuple[Path, str]]
Rule = Callable[[dict[str, Any]], Found]


def fp8_of(data: dict[str, Any]) -> dict[str, Any] | None:
    """The `fp8` section if it is on."""
    return data["fp8"] if is_enabled(data.get("fp8")) else None


def msamp_of(data: dict[str, Any]) -> dict[str, Any] | None:
    """The `msamp` section if it is on."""
    return data["msamp"] if is_enabled(data.get("msamp")) else None


def level_of(data: dict[str, Any]) -> Any:
    """The level in force, after overrides, or None."""
    given = msamp_of(data)
    if given is None:
        return None
    level = LEVELS[value_of(given, "msamp", "opt_level")]
    level = level.override(**{key: given[key] for key in LEVEL_KEYS if key in given})
    return level.keeping(moments_of(optimizer_type(data)))


def delayed_only_keys(data: dict[str, Any]) -> Found:
    """Steps, margins and histories belong to delayed scaling; elsewhere they would be ignored."""
    given = fp8_of(data) or {}
    recipe = value_of(given, "fp8", "recipe")
    for key in ("margin", "interval", "amax_history_len", "amax_compute_algo", "amax_rules", "reduce_amax"):
        if not RECIPE_KINDS[recipe].keeps_history and value_of(given, "fp8", key) != contract.default("fp8", key):
            yield (
                ("fp8", key),
                f"has no effect with recipe '{recipe}'; remove it, or set recipe to {listed(HISTORY_RECIPES)}",
            )


def something_is_swapped(data: dict[str, Any]) -> Found:
    """An opt-in that can convert nothing is a mistake."""
    layers = (fp8_of(data) or {}).get("layers")
    if isinstance(layers, dict) and layers.get("linear") is False and layers.get("norm") is False:
        yield ("fp8", "layers"), "linear and norm are both false, so nothing could run in FP8; set one to true"


def not_all_products_overridden(data: dict[str, Any]) -> Found:
    """With all three products in high precision there is no FP8 left."""
    if (fp8_of(data) or {}).get("override_linear_precision") == [True, True, True]:
        message = "keeps all three matrix products in high precision: no linear layer will compute in FP8"
        yield ("fp8", "override_linear_precision"), message


def use_te_agrees_with_backend(data: dict[str, Any]) -> Found:
    """msamp.use_te and fp8.backend say the same thing; when both are written they must agree."""
    backend, use_te = (fp8_of(data) or {}).get("backend", "auto"), (msamp_of(data) or {}).get("use_te", "auto")
    if use_te is True and backend == "torch":
        yield ("msamp", "use_te"), "true means backend transformer_engine, but fp8/backend is torch; change one of them"
    if use_te is False and backend == "transformer_engine":
        yield ("msamp", "use_te"), "false, but fp8/backend is transformer_engine; remove use_te or set it to true"


def use_te_needs_fp8(data: dict[str, Any]) -> Found:
    """use_te chooses who computes FP8 products; with fp8 off there are none."""
    if (msamp_of(data) or {}).get("use_te") is True and _fp8_is_switched_off(data):
        yield (
            ("msamp", "use_te"),
            "asks for FP8 matrix products, but fp8/enabled is false; set it to true or drop use_te",
        )


def only_fp8_weights_are_excluded(data: dict[str, Any]) -> Found:
    """weight_wire_exclude takes weights out of what travels in FP8; where none do it would do nothing."""
    level, given = level_of(data), msamp_of(data) or {}
    if level and level.weight_wire == "none" and given.get("weight_wire_exclude") not in (None, "auto", []):
        yield (
            ("msamp", "weight_wire_exclude"),
            "keeps weights out of those gathered in FP8, but weight_wire is none; remove it, or use opt_level O3",
        )


def rounding_has_something_to_round(data: dict[str, Any]) -> Found:
    """Stochastic rounding of formats that round nothing would be ignored."""
    level = level_of(data)
    if level and level.rounding == "stochastic" and "rounding" in explicit_keys(data["msamp"]):
        is_exact = {level.exp_avg, level.exp_avg_sq} <= {"fp32", ABSENT} and MASTERS[level.master].is_exact
        if is_exact:
            message = f"'stochastic' has no effect: {level.name} with these formats rounds nothing; remove it"
            yield ("msamp", "rounding"), message


def wire_scope_has_a_wire(data: dict[str, Any]) -> Found:
    """A scope of a wire that is none would be ignored."""
    level = level_of(data)
    if level and level.gradient_wire == "none" and level.gradient_wire_scope == "inter_node":
        yield ("msamp", "gradient_wire_scope"), "has no effect while gradient_wire is none; remove it"


def telemetry_is_one(data: dict[str, Any]) -> Found:
    """A job has one telemetry; two different ones contradict each other."""
    ours, theirs = (given.get("telemetry") if given else None for given in (fp8_of(data), msamp_of(data)))
    if ours not in (None, "auto") and theirs not in (None, "auto") and ours != theirs:
        yield ("msamp", "telemetry"), "differs from fp8/telemetry; keep one of the two"


def checkpoint_keys_are_one(data: dict[str, Any]) -> Found:
    """A job saves into one folder on a signal, and falls back or does not."""
    for key in ("checkpoint_on_signal", "checkpoint_fallback"):
        ours, theirs = (given.get(key, "auto") if given else "auto" for given in (fp8_of(data), msamp_of(data)))
        if "auto" not in (ours, theirs) and ours != theirs:
            yield ("msamp", key), f"differs from fp8/{key}; keep one of the two"


def _fp8_is_switched_off(data: dict[str, Any]) -> bool:
    return isinstance(data.get("fp8"), dict) and not is_enabled(data["fp8"])


RULES: tuple[Rule, ...] = (
    delayed_only_keys,
    something_is_swapped,
    use_te_agrees_with_backend,
    use_te_needs_fp8,
    only_fp8_weights_are_excluded,
    rounding_has_something_to_round,
    wire_scope_has_a_wire,
    telemetry_is_one,
    checkpoint_keys_are_one,
)

ADVICE: tuple[Rule, ...] = (not_all_products_overridden,)
"""Rules whose findings are warnings."""
