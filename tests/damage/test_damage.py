"""The damage table holds for a part of it: each 40th damage to a checkpoint of one file, and to those of two ranks.

`python tests/damage/run.py` tries all of them in a quarter of an hour or more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).with_name("run.py")


def damage(*arguments: str) -> dict[str, Any]:
    """The last line of the damage table's tool."""
    done = subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_wrong_kinds_that_read_well_are_refused():
    """Each of them loaded in silence once, or stopped the next step: weights and steps as whole numbers, an emptied
    state, steps for CUDA graphs on a CPU.
    """
    wrong = "module/[^/]*: of int32|/state: empty|step: of int32|capturable: negated"
    found = damage("--only", wrong, "fp8, stage 0, 1 rank, without", "fp8, stage 3, 2 ranks, without")
    assert found["bad"] == [] and found["damages"] > 15


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_damages_are_refused_or_harmless():
    """No raw error, no engine that a refusal has changed, no rank that hangs, or loads what another one refuses."""
    trials = ["fp8, stage 0, 1 rank, with manifest", "O2, stage 2, 2 ranks, without", "O3, stage 3, 2 ranks, without"]
    found = damage("--every", "40", *trials)
    assert found["bad"] == [] and found["damages"] > 60
