"""Scripts that do more than forward, backward and step give DeepSpeed's numbers with FP8 layers, or an error with
the name.
"""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks

from tests.engine import script_jobs

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROUNDING = 2.0**-4
"""e4m3's half step; what FP8 products may cost a loss, relative."""

MOVED = 0.25
"""How much the distance that weights have gone may differ, relative: signs of small gradients do, under Adam.

Not where the script writes to weights itself: at O2 a write stays, which DeepSpeed's next step overwrites.
"""


def modes(stage: int, *, thrifty: bool, **fp8: Any) -> dict[str, dict[str, Any]]:
    section = {"enabled": True, **fp8}
    found = {"control": {}, "fp8": {"fp8": section}}
    if stage:
        found["O3"] = {"fp8": section, "msamp": {"enabled": True, "opt_level": "O3"}}
    if stage == 2 and not thrifty:
        found |= {kind: {"fp8": section | {"recipe": kind}} for kind in ("current", "block")}
        found["O2"] = {"fp8": section, "msamp": {"enabled": True, "opt_level": "O2"}}
    return found


def cases(stages: tuple[int, ...], *, thrifty: bool = False, **fp8: Any) -> list[tuple[str, int, str, dict[str, Any]]]:
    return [
        (name, stage, mode, sections)
        for name in script_jobs.load()
        for stage in stages
        if stage not in script_jobs.NOT_IN[name]
        for mode, sections in modes(stage, thrifty=thrifty, **fp8).items()
    ]


def judge(found: dict[Any, Any]) -> list[Any]:
    """What differs from the control: (case, control's, found)."""
    wrong = []
    for (name, stage, mode), numbers in found.items():
        control = found[name, stage, "control"]
        if mode == "O3" and stage < 3 and name in script_jobs.WRITES:
            if not (
                isinstance(numbers, str) and numbers.startswith("WeightError") and "weight_wire_exclude" in numbers
            ):
                wrong.append(((name, stage, mode), "is refused", numbers))
        elif isinstance(numbers, str) and numbers.startswith("LayerError") and "fp8/backend to torch" in numbers:
            continue  # Transformer Engine cannot do it at O3, and says so by the layer's name
        elif (
            isinstance(control, str)
            or isinstance(numbers, str)
            or numbers.numbers != pytest.approx(control.numbers, rel=ROUNDING, abs=1e-3)
            or (name not in script_jobs.WRITES and numbers.moved != pytest.approx(control.moved, rel=MOVED))
        ):
            wrong.append(((name, stage, mode), control, numbers))
    return wrong


@pytest.mark.parametrize("stages", [(0, 2), (1, 3)])
def test_scripts_give_deepspeeds_numbers_or_an_error_with_the_name(stages):
    for found in run_ranks(2, script_jobs.several, cases(stages, thrifty=1 in stages), timeout_s=280):
        assert judge(found) == []
