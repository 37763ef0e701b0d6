"""Alarms: which layer, what happens to it, which key of the JSON to change.

An alarm is raised when it first appears, and again only after it was gone for a step.
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


OLD_AMAX = "an old amax holds the scale down"
SHORTER_HISTORY = "shorten fp8/amax_history_len, or use fp8/recipe current"


@dataclass(frozen=True)
class Alarm:
    """kind: `nonfinite`, `saturated`, `underflow` or `idle`; finding: what happens there; cure: the key to change."""

    kind: str
    fqn: str
    role: str
    finding: str
    cure: str

    @property
    def text(self) -> str:
        """What to print."""
        return f"{self.fqn}: {self.role} {self.finding}; {self.cure}"


def find_alarms(statistics: Iterable[TensorStatistics]) -> list[Alarm]:
    """Alarms of these statistics, the worst kind of each operand only: nonfinite, saturated, underflow, idle."""
    return [
        Alarm(found[0], operand.fqn, operand.role, *found[1:])
        for operand in statistics
        if (found := _judge(operand)) is not None
    ]


def new_alarms(alarms: list[Alarm], known: set[tuple[str, str, str]]) -> list[Alarm]:
    """Those not in `known`, which is updated to the ones that hold now."""
    held = {(alarm.kind, alarm.fqn, alarm.role) for alarm in alarms}
    fresh = [alarm for alarm in alarms if (alarm.kind, alarm.fqn, alarm.role) not in known]
    known.clear()
    known.update(held)
    return fresh


def _judge(operand: TensorStatistics) -> tuple[str, str, str] | None:
    """(kind, finding, cure) of one operand, or None if it is well."""
    if not operand.is_finite:
        return "nonfinite", "holds inf or NaN", "keep the layer out with fp8/layers/exclude if only FP8 shows it"
    if operand.amax == 0:
        return None
    bits = operand.headroom_bits
    if bits < -SATURATED_BITS:
        finding = f"is clamped: its largest value {operand.amax:.3g} lies {-bits:.1f} bits beyond the range"
        return "saturated", finding, "raise fp8/margin, or use fp8/recipe current"
    # What is lost counts before what is unused: a tensor that becomes zero is idle too, and that is the smaller evil.
    if operand.underflow is not None and operand.underflow > UNDERFLOW_SHARE:
        return "underflow", *_underflow(operand)
    if bits > IDLE_BITS:
        finding = f"leaves {bits:.0f} bits of {operand.format.name} unused"
        if bits - operand.margin <= IDLE_BITS:
            return "idle", f"{finding}, {operand.margin} of them by fp8/margin", "lower fp8/margin"
        return "idle", f"{finding} ({OLD_AMAX})", SHORTER_HISTORY
    return None


def _underflow(operand: TensorStatistics) -> tuple[str, str]:
    """(finding, cure): the key without which the alarm would not hold, as far as that was measured."""

    def is_well(share: float | None) -> bool:
        return share is not None and share <= UNDERFLOW_SHARE

    finding = f"loses {operand.underflow:.0%} of its elements to zero"
    if operand.margin and is_well(operand.underflow_without_margin):
        return f"{finding} because of fp8/margin {operand.margin}", "lower fp8/margin"
    if is_well(operand.underflow_of_own_amax):
        return f"{finding} ({OLD_AMAX})", SHORTER_HISTORY + (", and lower fp8/margin" if operand.margin else "")
    return finding, "use fp8/recipe block, or keep the layer out with fp8/layers/exclude"
