"""Rules that need more than one key: one tiny function per rule, all of one signature, each yielding problems.

A rule takes the whole configuration, which has passed the schema, and yields `(path, message)`; it knows nothing of
files and lines. A rule refuses what would be ignored or would compute something else than was asked for; what depends
on the model or the device is refused by the plan instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..levels import LEVELS
from ..recipe import HISTORY_RECIPES, OUR_RECIPES, OWNER_RECIPES, RECIPE_KINDS, TE_RECIPES, listed
from . import contract
from .facts import base_dtype, section, zero_stage
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
    return level.override(**{key: given[key] for key in LEVEL_KEYS if key in given})


def delayed_only_keys(data: dict[str, Any]) -> Found:
    """margin, interval and the history belong to delayed scaling; elsewhere they would be ignored."""
    given = fp8_of(data) or {}
    recipe = value_of(given, "fp8", "recipe")
    for key in ("margin", "interval", "amax_history_len", "amax_compute_algo"):
        if not RECIPE_KINDS[recipe].keeps_history and value_of(given, "fp8", key) != contract.default("fp8", key):
            yield (
                ("fp8", key),
                f"has no effect with recipe '{recipe}'; remove it, or set recipe to {listed(HISTORY_RECIPES)}",
            )


def blackwell_recipes_need_transformer_engine(data: dict[str, Any]) -> Found:
    """mxfp8 and nvfp4 exist in Transformer Engine only."""
    given = fp8_of(data) or {}
    recipe = value_of(given, "fp8", "recipe")
    if not RECIPE_KINDS[recipe].is_ours and given.get("backend") == "torch":
        message = (
            f"'{recipe}' needs backend transformer_engine, but fp8/backend is torch; use auto or transformer_engine"
        )
        yield ("fp8", "recipe"), message


def transformer_engine_knows_the_recipe(data: dict[str, Any]) -> Found:
    """Recipes that only our own layers compute."""
    given = fp8_of(data) or {}
    recipe = value_of(given, "fp8", "recipe")
    if RECIPE_KINDS[recipe].transformer_engine_since is None:
        cure = f"use recipe {listed(TE_RECIPES)}, or "
        if given.get("backend") == "transformer_engine":
            yield ("fp8", "recipe"), f"Transformer Engine has no recipe '{recipe}'; {cure}set fp8/backend to torch"
        if given.get("fuse") is True:
            yield ("fp8", "fuse"), f"Transformer Engine, which fuses, has no recipe '{recipe}'; {cure}drop fuse"


def fused_layers_need_transformer_engine(data: dict[str, Any]) -> Found:
    """The fused layers, LayerNorm+Linear and LayerNorm+MLP, are Transformer Engine's."""
    given = fp8_of(data) or {}
    if given.get("fuse") is True and given.get("backend") == "torch":
        yield ("fp8", "fuse"), "fused layers are Transformer Engine's, but fp8/backend is torch; change one of them"


def compiled_layers_are_our_own(data: dict[str, Any]) -> Found:
    """Transformer Engine's modules run outside a compiled graph: each would break it."""
    given = fp8_of(data) or {}
    if given.get("compile", False) in (False, "auto"):
        return
    if given.get("backend") == "transformer_engine" or not RECIPE_KINDS[value_of(given, "fp8", "recipe")].is_ours:
        yield (
            ("fp8", "compile"),
            (
                "Transformer Engine's layers (fp8/backend, fp8/recipe) run outside a compiled graph and break it at each layer; "
                f"set fp8/backend to torch with recipe {listed(OUR_RECIPES)}, or fp8/compile to false"
            ),
        )
    if given.get("fuse") is True:
        yield ("fp8", "compile"), "fp8/fuse makes layers of Transformer Engine, which break a compiled graph; drop one"


def compiled_blocks_keep_their_parameters(data: dict[str, Any]) -> Found:
    """ZeRO-3 gathers and releases parameters in hooks on every module."""
    if (fp8_of(data) or {}).get("compile", False) not in (False, "auto") and zero_stage(data) == 3:
        yield (
            ("fp8", "compile"),
            (
                "ZeRO-3 gathers parameters in hooks on every module, which break the graph at every layer; "
                "set zero_optimization/stage to 2, or fp8/compile to false"
            ),
        )


def graphs_replay_fixed_memory(data: dict[str, Any]) -> Found:
    """O3's codes of weights arrive in new memory at each step; a CUDA graph would read the old one."""
    given, level = (fp8_of(data) or {}).get("compile"), level_of(data)
    mode = given.get("mode") if isinstance(given, dict) else None
    if mode in ("reduce-overhead", "max-autotune") and level is not None and level.weight_wire != "none":
        yield (
            ("fp8", "compile", "mode"),
            (
                f"'{mode}' replays CUDA graphs, which read weights at fixed places; with msamp/weight_wire "
                f"{level.weight_wire} (O3) they arrive in new memory at each step; use default, or opt_level O2"
            ),
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


def fp8_weights_need_fp8_layers(data: dict[str, Any]) -> Found:
    """O3 sends weights as the codes that FP8 layers make of them; without such layers it would round the model itself."""
    level = level_of(data)
    if level and level.weight_wire == "e4m3" and _fp8_is_switched_off(data):
        yield (
            _level_path(data, "weight_wire"),
            (
                "FP8 weights are usable by FP8 layers only, but fp8/enabled is false; set it to true, or use opt_level O2"
            ),
        )


def fp8_weights_need_zero(data: dict[str, Any]) -> Found:
    """At stage 0 every rank owns every weight: no gather, nothing to send in FP8."""
    level = level_of(data)
    if level and level.weight_wire == "e4m3" and zero_stage(data) == 0:
        yield (
            _level_path(data, "weight_wire"),
            (
                f"{level.name if level.name == 'O3' else 'weight_wire e4m3'} needs FP8 weights in ZeRO, but "
                "zero_optimization/stage is 0; set stage to 1, 2 or 3, or use opt_level O2"
            ),
        )


def fp8_weights_need_codes(data: dict[str, Any]) -> Found:
    """Only recipes whose codes the owner of a weight can make."""
    level, given = level_of(data), fp8_of(data) or {}
    if level and level.weight_wire == "e4m3" and RECIPE_KINDS[value_of(given, "fp8", "recipe")].not_by_owner:
        message = f"FP8 weights have no codes for recipe '{given['recipe']}': {RECIPE_KINDS[given['recipe']].not_by_owner}; use {listed(OWNER_RECIPES)}, or opt_level O2"
        yield ("fp8", "recipe"), message


def only_fp8_weights_are_excluded(data: dict[str, Any]) -> Found:
    """weight_wire_exclude takes weights out of what travels in FP8; where none do it would do nothing."""
    level, given = level_of(data), msamp_of(data) or {}
    if level and level.weight_wire == "none" and given.get("weight_wire_exclude") not in (None, "auto", []):
        yield (
            ("msamp", "weight_wire_exclude"),
            "keeps weights out of those gathered in FP8, but weight_wire is none; remove it, or use opt_level O3",
        )


def masters_fit_the_base(data: dict[str, Any]) -> Found:
    """Split and fp16 masters complete a 16-bit weight; an fp32 parameter is its own master."""
    master = (msamp_of(data) or {}).get("master", "auto")
    if master in ("split32", "split24", "fp16") and base_dtype(data) == "fp32":
        message = f"'{master}' completes a 16-bit weight, but neither bf16 nor fp16 is enabled; enable one, or use fp32"
        yield ("msamp", "master"), message


def rounding_has_something_to_round(data: dict[str, Any]) -> Found:
    """Stochastic rounding of formats that round nothing would be ignored."""
    level = level_of(data)
    if level and level.rounding == "stochastic" and "rounding" in explicit_keys(data["msamp"]):
        exact = level.exp_avg == level.exp_avg_sq == "fp32" and level.master in ("fp32", "split32")
        if exact:
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


def _level_path(data: dict[str, Any], key: str) -> Path:
    """The key that the user wrote: the override, or the level that brought the default."""
    return ("msamp", key if key in explicit_keys(section(data, "msamp")) else "opt_level")


RULES: tuple[Rule, ...] = (
    delayed_only_keys,
    blackwell_recipes_need_transformer_engine,
    transformer_engine_knows_the_recipe,
    fused_layers_need_transformer_engine,
    compiled_layers_are_our_own,
    compiled_blocks_keep_their_parameters,
    graphs_replay_fixed_memory,
    something_is_swapped,
    use_te_agrees_with_backend,
    use_te_needs_fp8,
    fp8_weights_need_fp8_layers,
    fp8_weights_need_zero,
    fp8_weights_need_codes,
    only_fp8_weights_are_excluded,
    masters_fit_the_base,
    rounding_has_something_to_round,
    wire_scope_has_a_wire,
    telemetry_is_one,
    checkpoint_keys_are_one,
)

ADVICE: tuple[Rule, ...] = (not_all_products_overridden,)
"""Rules whose findings are warnings."""
