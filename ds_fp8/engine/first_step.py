"""Check after the first step: which of the planned layers really multiplied in FP8, forward and backward.

The banner shows the plan. A planned layer may still do nothing: it is never called, or a fused loss multiplies by its
weight itself (TRL's and Liger Kernel's by `lm_head.weight`), or it is called in eval mode only. So in the first step
the products of each layer set a flag (`layers/ran.py`), and weights of planned layers say whether a gradient reached
them. After the step all ranks are combined: a layer that runs on some ranks only has run.

    ds_fp8: FP8 in 62% of the model's FLOPs, all 224 planned layers ran in FP8 in step 1
    ds_fp8: WARNING: FP8 in 55% of the model's FLOPs, 223 of 224 planned layers ran in FP8 in step 1; not: lm_head
            (never called, and yet its weight got a gradient ...)

`fp8/first_step_check` makes an error of the second line, or turns the check off. After that step no hook and no flag is
left. Steps before `start_step` are passed over.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import PlanError
from ..layers.ran import Ran, has, watch
from ..plan import Plan, flops_share
from ..zero.touched import touched
from .printing import print_rank_0

TOUCHED = {"Engine": touched(reads="data_parallel_group global_steps"), "PipelineEngine": touched(reads="stage_id")}

SHOWN = 6
"""Layers named for each reason."""

CURE = "Put them into fp8/layers/exclude if that is meant"

GRADIENT = 1 << len(Ran.__slots__)
"""Beside the bits of `Ran`: a gradient reached the weight."""


class FirstStep:
    """Watches one attached engine until its first step in FP8."""

    def __init__(self, attachment: Any):
        self.attachment = attachment
        plan, modules = attachment.plan, dict(attachment.model.named_modules())
        self.names = [decision.fqn for decision in plan.swaps if decision.kind not in ("LayerNorm", "RMSNorm")]
        self.modules = [modules[name] for name in self.names]
        self.weights = [
            [weight for name, weight in module._parameters.items() if weight is not None and "bias" not in name]
            for module in self.modules
        ]
        self.reached: set[int] = set()
        self.hooks: list[Any] = []
        self.ran: list[Any] = []

    def begin(self) -> None:
        self.ran = watch(self.modules, on=True)
        for weight in {id(weight): weight for weights in self.weights for weight in weights}.values():
            if weight.requires_grad:
                self.hooks.append(weight.register_post_accumulate_grad_hook(self._note))

    def _note(self, weight: torch.Tensor) -> None:
        self.reached.add(id(weight))

    def stop(self) -> None:
        """No mark and no hook from now on."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        watch(self.modules, on=False)

    def after_step(self) -> bool:
        """Judge the step that was taken; False if the next one is to be looked at.

        Collective over the world, as the step is. Raises PlanError on all ranks if that was asked for.
        """
        attachment = self.attachment
        if attachment.fp8_state.steps <= attachment.plan.fp8.start_step:
            self.ran = watch(self.modules, on=True)
            self.reached.clear()
            return False
        seen, again = _together(attachment, self.names, self._bits())
        if again:  # in eval mode on some rank, whose next step is in FP8
            self.ran = watch(self.modules, on=True)
            self.reached.clear()
            return False
        self.stop()
        text, is_good = verdict(seen, attachment.engine.global_steps, attachment.plan)
        if not is_good and attachment.settings.fp8.first_step_check == "error":
            raise PlanError(f"{text}\n  {CURE}, or set fp8/first_step_check to warn.")
        print_rank_0(text if is_good else f"WARNING: {text}\n  {CURE}.")
        return True

    def _bits(self) -> list[int]:
        """What this rank saw of each layer."""
        used = {id(w) for weights, ran in zip(self.weights, self.ran, strict=True) if ran.called for w in weights}
        return [
            ran.bits() | (GRADIENT if any(id(w) in self.reached and id(w) not in used for w in weights) else 0)
            for weights, ran in zip(self.weights, self.ran, strict=True)
        ]


def _together(attachment: Any, names: list[str], bits: list[int]) -> tuple[dict[str, int], bool]:
    """What all ranks saw of every planned layer, and whether one has begun to train in eval mode in this step.

    Stages of a pipeline bring layers of their own.
    """
    import deepspeed.comm as dist

    again = attachment.mode.began
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(zip(names, bits, strict=True)), again
    # Names travel once for each stage of a pipeline, and not at all where every rank has the same.
    brings_names = attachment.plan.partial and dist.get_rank(group=attachment.engine.data_parallel_group) == 0
    part = getattr(attachment.model, "stage_id", 0) if attachment.plan.partial else 0
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (part, names if brings_names else None, bits, again))
    names_of = {part: own for part, own, _, _ in found if own is not None} if attachment.plan.partial else {0: names}
    seen: dict[str, int] = {}
    for part, _, of_rank, _ in found:
        for name, one in zip(names_of[part], of_rank, strict=True):
            seen[name] = seen.get(name, 0) | one
    return seen, any(again for *_, again in found)


def verdict(seen: dict[str, int], step: int, plan: Plan) -> tuple[str, bool]:
    """What to say of a step in which the layers did `seen` (bits by name), and whether all of them did what was
    planned.
    """
    failed = {name: reason for name, bits in seen.items() if (reason := _failure(bits))}
    small = [name for name, bits in seen.items() if _is_small(bits)]
    share = flops_share(plan, without=(*failed, *small))
    share_text = "" if share is None or plan.partial else f"FP8 in {share:.0%} of the model's FLOPs, "
    ran = len(seen) - len(failed) - len(small)
    if small:
        of_small = (
            f"{len(small)} module{'s' if len(small) > 1 else ''} of experts in bf16, as faster at their number of rows"
        )
        share_text, all_ran = f"{share_text}{of_small}, ", f"the other {ran}"
    else:
        all_ran = f"all {ran}"
    if not failed:
        return f"{share_text}{all_ran} planned layers ran in FP8 in step {step}", True
    by_reason: dict[str, list[str]] = {}
    for name, reason in failed.items():
        by_reason.setdefault(reason, []).append(name or "the model itself")
    listed = [
        ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "") + f" ({reason})"
        for reason, names in by_reason.items()
    ]
    return f"{share_text}{ran} of {len(seen)} planned layers ran in FP8 in step {step}; not: {'; '.join(listed)}", False


def _is_small(bits: int) -> bool:
    """Experts that ran in high precision because that is faster at their number of rows."""
    return has(bits, "small") and not has(bits, "fprop")


def _failure(bits: int) -> str | None:
    """Why a layer did not do what was planned; None if it did. What it did on any rank counts."""
    if not has(bits, "called"):
        if bits & GRADIENT:
            return (
                "never called, and yet its weight got a gradient: something else multiplied by it in high precision, "
                "as fused losses do"
            )
        return "never called"
    if _is_small(bits):
        return None
    if not has(bits, "fprop") and has(bits, "special"):
        return (
            "called only as FP8 casts cannot take it, so in high precision: with nested or sparse tensors or tensor "
            "subclasses, or inside torch.func, forward-mode derivatives or a tracer"
        )
    if not has(bits, "fprop"):
        return (
            "called in high precision only: in eval mode, in which from_pretrained gives a model; "
            "engine.train() ends it"
        )
    missing = [product for product in ("dgrad", "wgrad") if has(bits, f"wants_{product}") and not has(bits, product)]
    if missing:
        return f"no {' and no '.join(missing)}: its output was in no loss"
    return None
