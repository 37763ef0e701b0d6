"""The share of a model's matrix FLOPs that a plan computes in FP8, in words that the banner prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from .decisions import Plan, ProductDecision
from .flops import starred

LOW_SHARE = 0.5
"""Below it FP8 can hardly pay: with products twice as fast, half of them in FP8 make all of them 1.33x."""

SHOWN = 6
NAMED = 4


def flops_share(plan: Plan, without: Collection[str] = ()) -> float | None:
    """Share of the matrix FLOPs of a training step that compute in FP8; None where nothing was counted.

    without  names of planned layers that did not
    """
    total = sum(_flops(product) for product in plan.products)
    if not total:
        return None
    absent = _absent_parts(plan, without)
    # A product of stacked experts bears the name of its parameter, below that of the module.
    lost = {
        product.name: absent.get(product.name, absent.get(product.name.rpartition(".")[0], 0.0))
        for product in plan.products
    }
    return sum(_fp8_flops(product, plan) * (1 - lost[product.name]) for product in plan.products) / total


def _absent_parts(plan: Plan, without: Collection[str]) -> dict[str, float]:
    """Name of products -> the part of their layers that is in `without`."""
    planned = Counter(starred(decision.fqn) for decision in plan.swaps)
    return {name: count / planned[name] for name, count in Counter(map(starred, without)).items()}


def share_line(plan: Plan) -> str:
    """`62% of the model's matrix FLOPs in FP8 (assuming sequences of 4096 tokens); not: experts 30% (why), ...`"""
    share = flops_share(plan)
    if share is None:
        return "no matrix products found"
    total = sum(_flops(product) for product in plan.products)
    whose = "this pipeline stage's" if plan.partial else "the model's"
    text = f"{_percent(share)} of {whose} matrix FLOPs in FP8 (assuming sequences of {plan.length} tokens)"
    rest: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for product in plan.products:
        missing = _flops(product) - _fp8_flops(product, plan)
        if missing:
            label = "products in high precision by override_linear_precision" if product.fp8 else product.label
            if product.parts:
                label = "experts' products that are faster in bf16"
            rest[label] = rest.get(label, 0.0) + missing
            reasons.setdefault(label, product.reason if label in ("experts", "convolution") else "")
    ordered = sorted(rest, key=lambda label: -rest[label])
    parts = [
        f"{label} {_percent(rest[label] / total)}" + (f" ({reasons[label]})" if reasons[label] else "")
        for label in ordered[:SHOWN]
    ]
    if len(ordered) > SHOWN:
        parts.append(f"{len(ordered) - SHOWN} others {_percent(sum(rest[label] for label in ordered[SHOWN:]) / total)}")
    return text + (f"; not: {', '.join(parts)}" if parts else "")


def unknown_line(plan: Plan) -> str | None:
    """The parameters that no rule knows, and what the share is if each token is multiplied by each of them."""
    share = flops_share(plan)
    if not plan.unknown:
        return None
    more = f" and {len(plan.unknown) - NAMED} more" if len(plan.unknown) > NAMED else ""
    text = f"in no count, no rule knows them: {', '.join(plan.unknown[:NAMED])}{more}"
    if share is None:
        return text
    total = sum(_flops(product) for product in plan.products)
    least = share * total / (total + 3 * plan.unknown_macs)
    return f"{text}; if they multiply every token, {_percent(least)} is in FP8"


def share_warning(plan: Plan) -> str | None:
    """One line when too little computes in FP8 to pay; with the bound that follows (Amdahl's law)."""
    share = flops_share(plan)
    if share is None or share >= LOW_SHARE or plan.partial:
        return None
    return (
        f"WARNING: only {_percent(share)} of the matrix FLOPs compute in FP8: even at twice the speed that makes the "
        f"products {1 / (1 - share / 2):.2f}x, before the cost of the casts"
    )


def _flops(product: ProductDecision) -> float:
    """Forward, dgrad, wgrad; attention's two products have two each in the backward."""
    return product.macs * (3 if product.trained else 2)


def _fp8_flops(product: ProductDecision, plan: Plan) -> float:
    if not product.fp8:
        return 0.0
    high = plan.fp8.recipe.override_linear_precision._asdict()
    parts = product.parts.split() or ["fprop", "dgrad", *(["wgrad"] if product.trained else [])]
    return product.macs * sum(not high[part] for part in parts)


def _percent(share: float) -> str:
    if 0 < share < 0.005:
        return "<1%"
    return "99%" if 0.995 <= share < 1 else f"{share:.0%}"
