"""The refusals that need the model: something was asked for that nothing in this model can be.

Part of the one list in `refusals.py`. `check` has no model and meets none of them; `explain --model` and the job do.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..capabilities import Host
from .refusal import Layer, ModelFacts, Refusal
from .settings import Settings


def something_computes_in_fp8(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """An opt-in that converts nothing: the job would run, bill and report FP8 without any.

    FP8 products that `msamp` brings along were not asked for by name: its states are, and they convert any model.
    """
    if model is None or model.is_partial or not settings.fp8.enabled or settings.fp8.implied:
        return
    wants_products = settings.fp8.layers.linear
    if any(not layer.reason and (layer.multiplies or not wants_products) for layer in model.layers):
        return
    seen = [layer for layer in model.layers if layer.multiplies == wants_products]
    what = f"FP8 is asked for, but nothing would compute in FP8: {_kept(seen, wants_products)}"
    yield Refusal(("fp8", "enabled"), what, "Change fp8/layers or the model, or set fp8/enabled to false")


def _kept(seen: list[Layer], wants_products: bool) -> str:
    if not seen:
        return f"the model has no nn.{'Linear' if wants_products else 'LayerNorm or nn.RMSNorm'}"
    reasons = [f"{layer.fqn} ({layer.reason})" for layer in seen[:6]]
    more = f" and {len(seen) - 6} more" if len(seen) > 6 else ""
    kinds = " and ".join(dict.fromkeys(layer.kind for layer in seen))
    return f"all {len(seen)} {kinds} are kept: {', '.join(reasons)}{more}"


def frozen_weights_are_there(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """Frozen weights in FP8 alone, in a model that has none."""
    if model is None or model.is_partial or not settings.fp8.enabled or not settings.trains:
        return
    if settings.fp8.frozen_weights == "fp8" and not model.frozen_weights:
        what = "fp8: no FP8 layer of this model has a frozen weight of its own that all its products use in FP8"
        cure = "Freeze the base before deepspeed.initialize, as peft.get_peft_model does, or remove the key"
        yield Refusal(("fp8", "frozen_weights"), what, cure)


def exclusions_exclude(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """A glob that means no parameter."""
    if model is None or model.is_partial or not model.unmatched_exclusions:
        return
    what = f"{model.unmatched_exclusions[0]!r} matches no parameter of this model, so it would do nothing"
    names = f"{', '.join(model.matrices[:4])}{', ...' if len(model.matrices) > 4 else ''}"
    yield Refusal(("msamp", "weight_wire_exclude"), what, f"Weights of this model: {names}")


def fp8_weights_travel(settings: Settings, host: Host | None, model: ModelFacts | None) -> Iterator[Refusal]:
    """O3's weight wire was asked for, and no weight is fit for it. Brought along by a level, it is reported instead.

    A frozen base that is kept in FP8 is what O3 means for LoRA: 1 byte per weight, which ZeRO 3's gathers carry.
    """
    if model is None or model.is_partial or model.fp8_weights != 0:
        return
    if settings.fp8.implied and "weight_wire" not in settings.msamp.explicit:
        return
    if model.frozen_weights and settings.fp8.frozen_weights == "fp8":
        return
    path = ("msamp", "weight_wire" if "weight_wire" in settings.msamp.explicit else "opt_level")
    if model.frozen_weights:
        what = (
            "sends the weights of FP8 layers in quantized form after each step, but those of this model are frozen, as"
            " LoRA's base is: nothing steps them"
        )
        cure = 'Keep the frozen weights in FP8 (fp8/frozen_weights: "fp8", 1 byte each, sent so in ZeRO-3), or use O2'
        yield Refusal(path, what, cure)
        return
    what = (
        "sends the weights of FP8 layers in quantized form, but no weight qualifies: each is frozen, shared with "
        "another module, or used in high precision (override_linear_precision)"
    )
    yield Refusal(path, what, "Use opt_level O2")


MODEL_REFUSALS = (something_computes_in_fp8, frozen_weights_are_there, exclusions_exclude, fp8_weights_travel)
