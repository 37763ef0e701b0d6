"""What is refused, decided once: rules over the settings, over the machine where it is known, and over the model.

`check` and `load` ask them of a file, without a machine; the plan asks the same ones again of settings that no file
made, with the machine that the model will run on, and once more with the model. So a job is refused in the same words
wherever it is first seen, on every rank before ranks have met. Rules that need the model stand in `model_refusals.py`.
What only makes sense of a file's text (a key that would be ignored, two sections that contradict) is in `rules.py`,
what belongs to DeepSpeed's own features in `conflicts.py`. What one layer cannot do is a reason to keep it, beside it
in the plan (`plan/conversion_checks.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..capabilities import Host
from ..recipe import OUR_RECIPES, OWNER_RECIPES, TE_RECIPES, listed
from .model_refusals import MODEL_REFUSALS
from .positions import Path
from .refusal import ModelFacts, Refusal, Rule
from .settings import Settings


def recipe_needs_transformer_engine(
    settings: Settings, host: Host | None, model: ModelFacts | None
) -> Iterator[Refusal]:
    """Recipes that only Transformer Engine's layers compute."""
    fp8 = settings.fp8
    if not fp8.recipe.facts.is_ours and fp8.backend == "torch":
        what = f"recipe '{fp8.recipe.kind}' exists in Transformer Engine only, but fp8/backend is torch"
        yield Refusal(("fp8", "recipe"), what, "Use backend auto or transformer_engine")


def recipe_needs_our_layers(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """Recipes that Transformer Engine does not have."""
    fp8 = settings.fp8
    if fp8.recipe.facts.transformer_engine_since is not None:
        return
    cure = f"Set fp8/backend to torch, or use recipe {listed(TE_RECIPES)}"
    if fp8.backend == "transformer_engine":
        what = (
            f"Transformer Engine has no recipe '{fp8.recipe.kind}', but msamp/use_te or fp8/backend asks for its layers"
        )
        yield Refusal(("fp8", "recipe"), what, cure)
    if fp8.fuse:
        what = f"Transformer Engine, whose layers are fused, has no recipe '{fp8.recipe.kind}'"
        yield Refusal(("fp8", "fuse"), what, f"Drop fuse, or use recipe {listed(TE_RECIPES)}")


def recipe_needs_a_device(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """Recipes that the GPU at hand is too old for."""
    kind, since = settings.fp8.recipe.kind, settings.fp8.recipe.facts.transformer_engine_since
    if host is None or settings.fp8.recipe.facts.is_ours or since is None or host.device_type != "cuda":
        return
    if not host.at_least(since):
        what = f"{kind} needs a GPU of compute capability {since[0]}.{since[1]} (Blackwell), but this is {host}"
        yield Refusal(("fp8", "recipe"), what, f"Use {listed(OUR_RECIPES)}")


def transformer_engine_runs(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """What needs Transformer Engine's layers, where they do not run. MS-AMP's `use_te` is a wish: ours stand in."""
    fp8 = settings.fp8
    asked = fp8.backend == "transformer_engine" and not settings.msamp.use_te
    needs = asked or fp8.fuse or not fp8.recipe.facts.is_ours
    if host is None or not fp8.enabled or fp8.backend == "torch" or not needs:
        return
    if (why := host.why_no_transformer_engine) is None:
        return
    if not fp8.recipe.facts.is_ours:
        what = f"{fp8.recipe.kind} runs in Transformer Engine only, which does not run here: {why}"
        yield Refusal(("fp8", "recipe"), what, f"Use {listed(OUR_RECIPES)}")
    elif asked:
        what = f"transformer_engine does not run here: {why}"
        yield Refusal(("fp8", "backend"), what, "Use auto or torch: the same numerics without Transformer Engine")
    elif fp8.fuse:
        what = f"joins norm and Linear into one Transformer Engine layer, which does not run here: {why}"
        yield Refusal(("fp8", "fuse"), what, "Set fp8/fuse to false or auto")


def fused_layers_need_transformer_engine(
    settings: Settings, host: Host | None, model: ModelFacts | None
) -> Iterator[Refusal]:
    """Norm and Linear are joined by Transformer Engine's layers; ours are not."""
    if settings.fp8.fuse and settings.fp8.backend == "torch":
        what = "joins norm and Linear into one Transformer Engine layer, but the backend is torch"
        yield Refusal(("fp8", "fuse"), what, "Set fp8/fuse to false or auto, or change the backend")


def fused_layers_are_whole(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """A fused layer refers to the norm's parameters, and computes all three products alike."""
    fp8 = settings.fp8
    if fp8.fuse and settings.deepspeed.zero_stage == 3:
        what = (
            "ZeRO-3 gathers the parameters of the module that runs, and a fused layer reads those of the norm beside it"
        )
        yield Refusal(("fp8", "fuse"), what, "Set fp8/fuse to false, or zero_optimization/stage to 2")
    if fp8.fuse and any(fp8.recipe.override_linear_precision):
        what = "a fused layer cannot leave single products in high precision"
        yield Refusal(("fp8", "fuse"), what, "Set fp8/fuse to false, or drop fp8/override_linear_precision")


def compiled_layers_are_our_own(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """Transformer Engine's modules run outside a compiled graph: each would break it."""
    fp8 = settings.fp8
    if fp8.compile is None:
        return
    if fp8.backend == "transformer_engine" or not fp8.recipe.facts.is_ours:
        what = (
            "Transformer Engine's layers (fp8/backend, fp8/recipe, msamp/use_te) run outside a compiled graph and "
            "break it at each layer"
        )
        cure = f"Set fp8/backend to torch with recipe {listed(OUR_RECIPES)}, or fp8/compile to false"
        yield Refusal(("fp8", "compile"), what, cure)
    if fp8.fuse:
        what = "fp8/fuse makes layers of Transformer Engine, which break a compiled graph"
        yield Refusal(("fp8", "compile"), what, "Drop one of the two")


def compiled_blocks_keep_their_parameters(
    settings: Settings, host: Host | None, model: ModelFacts | None
) -> Iterator[Refusal]:
    """ZeRO-3 gathers and releases parameters in hooks on every module."""
    if settings.fp8.compile is not None and settings.deepspeed.zero_stage == 3:
        what = "ZeRO-3 gathers parameters in hooks on every module, which break the graph at every layer"
        yield Refusal(("fp8", "compile"), what, "Set zero_optimization/stage to 2, or fp8/compile to false")


def graphs_replay_fixed_memory(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """A CUDA graph reads the memory that it was recorded with, whatever the host has found out since."""
    compile, level = settings.fp8.compile, settings.msamp.level  # noqa: A001 (the key's name)
    if compile is None or compile.mode not in ("reduce-overhead", "max-autotune"):
        return
    if settings.fp8.weight_cache:
        what = f"'{compile.mode}' replays CUDA graphs, which cast each weight in every replay: nothing can be kept"
        yield Refusal(("fp8", "weight_cache"), what, "Drop weight_cache, or set fp8/compile/mode to default")
    if settings.msamp.enabled and level is not None and level.weight_wire != "none":
        what = (
            f"'{compile.mode}' replays CUDA graphs, which read weights at fixed places; with msamp/weight_wire "
            f"{level.weight_wire} (O3) they arrive in new memory at each step"
        )
        yield Refusal(("fp8", "compile", "mode"), what, "Use default, or opt_level O2")


def frozen_weights_are_whole(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """Frozen weights in FP8 alone: somebody must be able to make their data, once, and to keep nothing else."""
    fp8 = settings.fp8
    if not fp8.enabled or fp8.frozen_weights != "fp8":
        return
    path: Path = ("fp8", "frozen_weights")
    if settings.deepspeed.zero_stage == 3 and settings.deepspeed.offload_param == "nvme":
        what = "fp8: zero_optimization/offload_param/device nvme keeps the 16-bit weights in files of its own"
        yield Refusal(path, what, "Offload parameters to cpu, or remove the key")
    if why := fp8.recipe.facts.not_by_owner:
        what = f"fp8 makes data for the recipes {listed(OWNER_RECIPES, 'and')}, not for {fp8.recipe.kind}: {why}"
        yield Refusal(path, what, f"Use recipe {listed(OWNER_RECIPES)}, or remove the key")


def fp8_weights_are_made_and_used(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """FP8 weights on the wire: somebody must gather them, make their data, and multiply with them."""
    level = settings.msamp.level
    if not settings.msamp.enabled or level is None or level.weight_wire != "e4m3":
        return
    path: Path = ("msamp", "weight_wire" if "weight_wire" in settings.msamp.explicit else "opt_level")
    asked = "opt_level O3" if level.name == "O3" else "weight_wire e4m3"
    if settings.deepspeed.zero_stage == 0:
        what = f"{asked} needs FP8 weights in ZeRO, but zero_optimization/stage is 0"
        yield Refusal(path, what, "Set stage to 1, 2 or 3, or use opt_level O2")
    if not settings.fp8.enabled:
        what = f"{asked} sends weights as the data of FP8 layers, but fp8 is off (fp8/enabled is false)"
        yield Refusal(path, what, "Enable fp8, or use opt_level O2")
    elif why := settings.fp8.recipe.facts.not_by_owner:
        what = (
            f"msamp's {asked} sends FP8 weights of the recipes {listed(OWNER_RECIPES, 'and')}, but fp8/recipe is "
            f"{settings.fp8.recipe.kind}: {why}"
        )
        yield Refusal(("fp8", "recipe"), what, f"Use {listed(OWNER_RECIPES)}, or opt_level O2")


def masters_fit_the_base(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """Split and fp16 masters complete a 16-bit weight; an fp32 parameter is its own master. A default is adapted
    instead.
    """
    level = settings.msamp.level
    if not settings.msamp.enabled or level is None or settings.deepspeed.base_dtype != "fp32":
        return
    if level.master != "fp32" and "master" in settings.msamp.explicit:
        what = f"master {level.master} completes a 16-bit weight, but the parameters are fp32"
        yield Refusal(("msamp", "master"), what, "Enable bf16 or fp16, or set msamp/master to fp32")


def unscaled_fp16(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """DeepSpeed since 0.18.4: at stage 0 fp16 does not scale the loss, but unscales the gradients. msamp's optimizer
    does both.
    """
    facts = settings.deepspeed
    if not settings.trains or not settings.fp8.enabled or settings.msamp.enabled:
        return
    if facts.base_dtype == "fp16" and facts.zero_stage == 0:
        what = (
            "fp16 at ZeRO stage 0 trains wrongly in DeepSpeed since 0.18.4: it unscales the gradients without having "
            "scaled the loss, with or without FP8"
        )
        yield Refusal(("fp16", "enabled"), what, "Set zero_optimization/stage to 1, 2 or 3, or use bf16")


REFUSALS: tuple[Rule, ...] = (
    unscaled_fp16,
    recipe_needs_transformer_engine,
    recipe_needs_our_layers,
    recipe_needs_a_device,
    fused_layers_need_transformer_engine,
    fused_layers_are_whole,
    compiled_layers_are_our_own,
    compiled_blocks_keep_their_parameters,
    graphs_replay_fixed_memory,
    frozen_weights_are_whole,
    fp8_weights_are_made_and_used,
    masters_fit_the_base,
    transformer_engine_runs,
    *MODEL_REFUSALS,
)
"""Every rule, in the order in which a job is refused where only one reason can be shown."""


def refusals(settings: Settings, host: Host | None = None, model: ModelFacts | None = None) -> Iterator[Refusal]:
    """All that is wrong with `settings`; `host` and `model` where they are known."""
    for rule in REFUSALS:
        yield from rule(settings, host, model)
