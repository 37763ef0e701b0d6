"""Which products of stacked experts FP8 makes faster on Hopper, from how many rows on: a model of the time, fitted to
measurements.

An FP8 product saves time with every multiply-add, and costs a cast of the weight, whatever the rows, and one of the
rows. Per expert, in picoseconds:

    rows * out * in * SAVED  >  out * in * WEIGHT  +  rows * columns * ROW(columns)

So each product of each weight has a least number of rows per expert. wgrad needs casts of both operands across their
rows, and was never faster with them: it stays in bf16. Fewer rows than that: bf16, in that call. All constants are
fitted to Mixtral's, gpt-oss's and Qwen3's shapes on an H100 and an H200, a little on bf16's side. Experts in bf16 of
which no product wins are converted all the same: the kernels around the products (sort, biases, gates, sums) alone made
Qwen3's block 1.87x.
Source: benchmarks/results/gpu_h100_moe_202611.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..capabilities import Host
from ..recipe import RECIPE_KINDS, HighPrecision
from .decisions import ModuleDecision
from .expert_rules import rule_of
from .performance import measured

SAVED = 0.9e-3
"""Per multiply-add; 0.9e-3 to 1.4e-3 were measured, 0.6e-3 where a side is 768."""

WEIGHT = {(False, "fprop"): 1.0, (False, "dgrad"): 1.3, (True, "fprop"): 1.85, (True, "dgrad"): 0.95}
"""Per element, by layout ([in, out] or not) and product: a cast as the weight lies is one pass, one across it nearly
two. Means of an H200 and an H100, whose memory is slower.
"""

TOKENS = 65536
"""Of a micro-batch: a product that wants more never runs in FP8."""

NONE = "none"
"""Of fprop, dgrad and wgrad."""


def is_measured(host: Host, recipe: str) -> bool:
    """Whether anything is known about experts under this recipe on this device."""
    return measured(host) and RECIPE_KINDS[recipe].experts_scale_extent == "row"


def least_rows(out: int, columns: int, transposed: bool, weight_cache: bool) -> tuple[int, int]:
    """Rows per expert from which fprop, and dgrad, of weights [out, columns] are faster in FP8; 0 for never.

    transposed    the weight lies as [in, out]
    weight_cache  a cast serves several micro-batches: two, at the least
    """
    found = []
    for product, summed, kept in (("fprop", columns, out), ("dgrad", out, columns)):
        weight = WEIGHT[transposed, product] * (0.5 if weight_cache else 1.0)
        saved = SAVED * kept - _row(summed)
        found.append(math.ceil(weight * kept / saved) if saved > 0 else 0)
    return found[0], found[1]


def _row(columns: int) -> float:
    """Cast of rows this wide, per element."""
    return 0.9 + 1000 / columns


def least_rows_of(module: nn.Module, visited: int | None, weight_cache: bool) -> tuple[int, ...]:
    """`ModuleDecision.least_rows` of a module of experts; empty if no product wins in a micro-batch of TOKENS, and the
    weights are not in bf16.

    visited  experts that a token visits; None: unknown, so one
    """
    rule = rule_of(module)
    found: list[int] = []
    if rule is None:
        return ()
    for name, (experts, out, columns) in zip(rule.weights, rule.shapes(module), strict=True):
        most = TOKENS * (visited or 1) / experts
        rows = least_rows(out, columns, name in rule.transposed, weight_cache)
        found += [one if one <= most else 0 for one in rows]
    in_bf16 = all(module.get_parameter(name).dtype == torch.bfloat16 for name in rule.weights)
    return tuple(found) if any(found) or in_bf16 else ()


def high_precision(least: tuple[int, int], rows: float) -> HighPrecision:
    """The products of a weight that are faster in bf16 with `rows` rows per expert."""
    fprop, dgrad = least
    return HighPrecision(fprop=not 0 < fprop <= rows, dgrad=not 0 < dgrad <= rows, wgrad=True)


def parts_of(decision: ModuleDecision, module: nn.Module, name: str) -> str:
    """`ProductDecision.parts` of one weight of a module of experts."""
    rule = rule_of(module)
    if not decision.least_rows or rule is None or name not in rule.weights:
        return ""
    place = 2 * rule.weights.index(name)
    fprop, dgrad = decision.least_rows[place : place + 2]
    return " ".join(part for part, rows in (("fprop", fprop), ("dgrad", dgrad)) if rows) or NONE


def in_words(decisions: Sequence[ModuleDecision]) -> str:
    """`; bf16 where FP8 is slower: wgrad, and fprop and dgrad below 930 to 1742 rows per expert`, or nothing."""
    every = [one for decision in decisions for one in decision.least_rows]
    rows = sorted({one for one in every if one})
    if not rows:
        return "; all products in bf16, which is faster at these shapes" if every else ""
    if rows == [1]:
        return "; wgrad in bf16, which is faster"
    some = not all(every)
    below = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}, by their shapes,"
    also = ", and a part of fprop and dgrad always" if some else ""
    return f"; bf16 where FP8 is slower: wgrad, and fprop and dgrad below {below} rows per expert{also}"
