"""A telemetry log (JSONL) as series over optimizer steps: what `ds_fp8 report` draws.

A resumed run appends its plan and goes on from the step of its checkpoint, so some steps may stand there twice: the
later line is the run that went on, and counts. A line that is no event of ours is left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..telemetry.tensor_statistics import ROLES

QUANTITIES = ("amax", "scale", "underflow")

Series = tuple[list[int], list[float]]
"""(steps, values)"""


@dataclass(frozen=True)
class SeenAlarm:
    """An alarm as it stands in the log; `cure` and `role` are read out of the text of older logs."""

    step: int
    kind: str
    fqn: str
    role: str
    text: str
    cure: str


@dataclass(frozen=True)
class History:
    """One rank's run.

    runs    how often the job was started into this log
    banner  the last plan, as rank 0 printed it
    steps   the `step` events in order, one for each optimizer step that was looked at
    alarms  in the order in which they were raised
    odd     lines that are no events, or lack what an event has
    """

    runs: int
    banner: str
    steps: tuple[dict[str, Any], ...]
    alarms: tuple[SeenAlarm, ...] = ()
    odd: int = 0

    def layers(self) -> list[str]:
        """Names in the order in which the model has them."""
        return list(dict.fromkeys(operand["fqn"] for step in self.steps for operand in step["readings"]))

    def statistics(self, role: str, quantity: str) -> dict[str, Series]:
        """Layer -> (steps, values); inf, NaN and what was not measured are left out."""
        assert role in ROLES and quantity in QUANTITIES
        series: dict[str, Series] = {}
        for step in self.steps:
            for operand in step["readings"]:
                if operand["role"] == role and (value := number(operand.get(quantity))) is not None:
                    at, values = series.setdefault(operand["fqn"], ([], []))
                    at.append(step["step"])
                    values.append(value)
        return series

    def values(self, name: str) -> Series:
        """(steps, values) of one aggregate, e.g. `wire/gradient_bytes`, or of `loss`; empty when there is none."""
        found = [(step["step"], value) for step in self.steps if (value := _value(step, name)) is not None]
        return [at for at, _ in found], [value for _, value in found]

    def sent_bytes(self) -> Series:
        """(steps, bytes for each step) that this rank sent, of all kinds; empty where no exchange of ours was
        counted.
        """
        found = []
        for step in self.steps:
            kinds = [_value(step, name) for name in step["values"] if name.startswith("wire/") and "bytes" in name]
            if total := sum(value for value in kinds if value is not None):
                found.append((step["step"], total))
        return [at for at, _ in found], [value for _, value in found]

    def bytes_of_deepspeed(self) -> Series:
        """(steps, bytes for each step) that DeepSpeed's own collectives would have sent for the same tensors."""
        sent = dict(zip(*self.sent_bytes()))
        found = [(at, sent[at] / ratio) for at, ratio in zip(*self.values("wire/ratio")) if ratio > 0 and at in sent]
        return [at for at, _ in found], [value for _, value in found]


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def _value(step: dict[str, Any], name: str) -> float | None:
    return number(step.get("loss") if name == "loss" else step["values"].get(name))


def read_history(events: Iterable[dict[str, Any]]) -> History:
    """From the lines of `telemetry.read_jsonl_log`."""
    runs, banner, odd = 0, "", 0
    steps: dict[int, dict[str, Any]] = {}
    alarms: dict[tuple[int, str, str], SeenAlarm] = {}
    for event in events:
        if event.get("event") == "plan":
            runs, banner = runs + 1, str(event.get("banner", ""))
        elif event.get("event") == "step" and (step := _step(event)):
            # What an earlier run had done after this step was lost with it.
            steps = {at: known for at, known in steps.items() if at < step["step"]}
            alarms = {key: known for key, known in alarms.items() if key[0] < step["step"]}
            steps[step["step"]] = step
        elif event.get("event") == "alarm" and (alarm := _alarm(event)):
            alarms[alarm.step, alarm.fqn, alarm.text] = alarm
        else:
            odd += 1
    return History(runs, banner, tuple(steps.values()), tuple(alarms.values()), odd)


def _step(event: dict[str, Any]) -> dict[str, Any] | None:
    """The event with everything in its place, or None if it has no step."""
    if type(event.get("step")) is not int:
        return None
    values, readings = event.get("values"), event.get("readings")
    known = [
        operand
        for operand in (readings if isinstance(readings, list) else ())
        if isinstance(operand, dict) and isinstance(operand.get("fqn"), str) and operand.get("role") in ROLES
    ]
    return {**event, "values": values if isinstance(values, dict) else {}, "readings": known}


def _alarm(event: dict[str, Any]) -> SeenAlarm | None:
    step, kind, fqn, text = (event.get(key) for key in ("step", "kind", "fqn", "text"))
    if type(step) is not int or not (isinstance(kind, str) and isinstance(fqn, str) and isinstance(text, str)):
        return None
    role = event.get("role") or next((role for role in ROLES if f": {role} " in text), "")
    cure = event.get("cure") or text.rpartition("; ")[2]
    return SeenAlarm(step, kind, fqn, str(role), text, str(cure))
