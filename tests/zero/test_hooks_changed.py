"""ZeRO 3's hooks in our form, in jobs that a script changes after `deepspeed.initialize`."""

from __future__ import annotations

import hooks_jobs
import pytest
import torch
from ranks import run_ranks

from ds_fp8.zero import hooks_known

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def found():
    if not hooks_known.is_known():
        pytest.skip("this DeepSpeed keeps its own hooks")
    return run_ranks(2, hooks_jobs.changed_in_mid_run, timeout_s=280)[0]


@pytest.mark.parametrize("level", [None, "O3"])
def test_a_part_that_is_frozen_in_mid_run_is_let_go(found, level):
    """Under checkpointing DeepSpeed lets frozen weights go with the innermost module in backward: from then on all
    modules are among these, and everything is as with its own hooks, to the bit.
    """
    ours, theirs = found["ours"][level], found["theirs"][level]
    assert (ours["hooks"], theirs["hooks"]) == ("Fp8DeepSpeedZeRoOffload", "DeepSpeedZeRoOffload")
    assert ours["losses"] == theirs["losses"]
    assert all(map(torch.equal, ours["weights"], theirs["weights"]))
    # What is gathered ahead when an evaluation breaks the trace stays until the next step, with DeepSpeed's hooks too.
    assert [bool(names) for names in ours["kept"]] == [bool(names) for names in theirs["kept"]]
    assert sum(map(bool, ours["kept"])) <= 1
    assert not ours["skips"], "no module is left out any more"


def test_a_compiled_engine_has_deepspeeds_hooks(found):
    """torch.compile is told not to look into them, and would compile each of ours: as many graphs and breaks."""
    (losses, hooks, traced, counted), (expected, _, _, with_theirs) = found["compiled"]
    assert losses == expected and hooks == "DeepSpeedZeRoOffload" and traced == []
    assert counted == with_theirs and counted[0] > 0
