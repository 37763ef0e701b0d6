"""A telemetry log (JSONL) as series over optimizer steps: what `ds_fp8 report` draws.

A resumed run appends its plan and goes on from the step of its checkpoint, so some steps may stand there twice: the
later line is the run that went on, and counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..telemetry.tensor_statistics import ROLES

QUANTITIES = ("amax", "scale", "underflow")


@dataclass(frozen=True)
class History:
    """One rank's run.

    runs    how often the job was started into this log
    banner  the last plan, as rank 0 printed it
    steps   the `step` events in order, one for each optimizer step that was looked at
    alarms  (step, kind, layer, text)
    """

    runs: int
    banner: str
    steps: tuple[dict[str, Any], ...]
    alarms: tuple[tuple[int, str, str, str], ...]

    def layers(self) -> list[str]:
        """Names in the order in which the model has them."""
        return list(dict.fromkeys(operand["fqn"] for step in self.steps for operand in step["readings"]))

    def statistics(self, role: str, quantity: str) -> dict[str, tuple[list[int], list[float]]]:
        """Layer -> (steps, values); inf, NaN and what was not measured are left out."""
        assert role in ROLES and quantity in QUANTITIES
        series: dict[str, tuple[list[int], list[float]]] = {}
        for step in self.steps:
            for operand in step["readings"]:
                if operand["role"] == role and isinstance(operand[quantity], (int, float)):
                    at, values = series.setdefault(operand["fqn"], ([], []))
                    at.append(step["step"])
                    values.append(operand[quantity])
        return series

    def values(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one aggregate, e.g. `wire/gradient_bytes`, or of `loss`; empty when there is none."""
        found = [(step["step"], value) for step in self.steps if (value := _value(step, name)) is not None]
        return [at for at, _ in found], [value for _, value in found]

    def bytes_of_deepspeed(self) -> tuple[list[int], list[float]]:
        """(steps, bytes for each step) that DeepSpeed's own collectives would have sent for the same tensors."""
        at, ratios = self.values("wire/ratio")
        sent = dict(zip(*self.sent_bytes()))
        return at, [sent[step] / ratio if ratio else 0.0 for step, ratio in zip(at, ratios)]

    def sent_bytes(self) -> tuple[list[int], list[float]]:
        """(steps, bytes for each step) that this rank sent, of all kinds."""
        kinds = [
            name for step in self.steps[:1] for name in step["values"] if name.startswith("wire/") and "bytes" in name
        ]
        at = [step["step"] for step in self.steps]
        return at, [sum(step["values"].get(name, 0.0) for name in kinds) for step in self.steps]


def _value(step: dict[str, Any], name: str) -> float | None:
    return step.get("loss") if name == "loss" else step["values"].get(name)


def read_history(events: Iterable[dict[str, Any]]) -> History:
    """From the lines of `telemetry.read_jsonl_log`."""
    runs, banner, steps, alarms = 0, "", {}, {}
    for event in events:
        if event["event"] == "plan":
            runs, banner = runs + 1, event["banner"]
        elif event["event"] == "step":
            # What an earlier run had done after this step was lost with it.
            for known in (steps, alarms):
                for key in [key for key in known if _step_of(key) >= event["step"]]:
                    del known[key]
            steps[event["step"]] = event
        elif event["event"] == "alarm":
            alarms[event["step"], event["fqn"], event["text"]] = (
                event["step"],
                event["kind"],
                event["fqn"],
                event["text"],
            )
    return History(runs, banner, tuple(steps.values()), tuple(alarms.values()))


def _step_of(key: Any) -> int:
    return key[0] if isinstance(key, tuple) else key
