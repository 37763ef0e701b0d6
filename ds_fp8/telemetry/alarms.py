"""From a number to a sentence that helps: which layer, what happens to it, which key to change.

An alarm is raised when it first appears, and again only after it had gone: a log that repeats itself is not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .tensor_statistics import TensorStatistics

SATURATED_BITS = 1.0
"""Clamping by less than one bit is what margin is for, and normal for a step or two while a model warms up."""

IDLE_BITS = 12.0
"""E4M3 spans 18 powers of two, subnormals included: with twelve of them unused above the largest value, most of a
bell-shaped tensor lies below the smallest code."""

UNDERFLOW_SHARE = 0.25


@dataclass(frozen=True)
class Alarm:
    """kind: `nonfinite`, `saturated`, `idle` or `underflow`; text: what to print."""

    kind: str
    fqn: str
    role: str
    text: str


def find_alarms(statistics: Iterable[TensorStatistics]) -> list[Alarm]:
    """Alarms of these statistics, the worst kind of each operand only."""
    return [alarm for operand in statistics if (alarm := _alarm(operand)) is not None]


def new_alarms(alarms: list[Alarm], known: set[tuple[str, str, str]]) -> list[Alarm]:
    """Those not in `known`, which is updated to the ones that hold now."""
    held = {(alarm.kind, alarm.fqn, alarm.role) for alarm in alarms}
    fresh = [alarm for alarm in alarms if (alarm.kind, alarm.fqn, alarm.role) not in known]
    known.clear()
    known.update(held)
    return fresh


def _alarm(operand: TensorStatistics) -> Alarm | None:
    where = f"{operand.fqn}: {operand.role}"

    def alarm(kind: str, text: str) -> Alarm:
        return Alarm(kind, operand.fqn, operand.role, f"{where} {text}")

    if not operand.is_finite:
        return alarm("nonfinite", "holds inf or NaN; keep the layer out with fp8/layers/exclude if only FP8 shows it")
    if operand.amax == 0:
        return None
    if operand.headroom_bits < -SATURATED_BITS:
        return alarm(
            "saturated",
            f"is clamped: its largest value {operand.amax:.3g} lies {-operand.headroom_bits:.1f} bits beyond the range; "
            "raise fp8/margin, or use fp8/recipe current",
        )
    if operand.headroom_bits > IDLE_BITS:
        return alarm(
            "idle",
            f"leaves {operand.headroom_bits:.0f} bits of {operand.format.name} unused (an old amax holds the scale down); "
            "shorten fp8/amax_history_len, or use fp8/recipe current",
        )
    if operand.underflow is not None and operand.underflow > UNDERFLOW_SHARE:
        return alarm(
            "underflow",
            f"loses {operand.underflow:.0%} of its elements to zero; use fp8/recipe block, "
            "or keep the layer out with fp8/layers/exclude",
        )
    return None
