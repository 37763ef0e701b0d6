"""A job that asks for nothing gets nothing: the same bits as DeepSpeed alone, in every stage."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from tests.engine.engine_jobs import config, train

SECTIONS = {
    "absent": {},
    "disabled": {"fp8": {"enabled": False}, "msamp": {"enabled": False, "opt_level": "O2"}},
}


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_absent_and_disabled_sections_change_no_bit(stage):
    """Losses and all weights after four steps on two ranks, with and without the plugin: torch.equal, no tolerance."""
    plain = run_ranks(2, train, config(stage), False)
    for sections in SECTIONS.values():
        found = run_ranks(2, train, config(stage, **sections), True)
        for mine, theirs in zip(found, plain):
            assert not mine["attached"] and mine["losses"] == theirs["losses"]
            assert all(torch.equal(mine["weights"][name], theirs["weights"][name]) for name in theirs["weights"])
