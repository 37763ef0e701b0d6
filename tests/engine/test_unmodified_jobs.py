"""A job that asks for nothing gets nothing: the same bits as DeepSpeed alone, in every stage."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from tests.engine.engine_jobs import config, several

DISABLED = {"fp8": {"enabled": False}, "msamp": {"enabled": False, "opt_level": "O2"}}


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_absent_and_disabled_sections_change_no_bit(stage):
    """Losses and all weights after four steps on two ranks, with and without the plugin: torch.equal, no tolerance."""
    calls = [
        ("train", (config(stage), False)),
        ("train", (config(stage), True)),
        ("train", (config(stage, **DISABLED), True)),
    ]
    for baseline, *others in run_ranks(2, several, calls):
        for found in others:
            assert not found["attached"] and found["losses"] == baseline["losses"]
            assert all(torch.equal(found["weights"][name], baseline["weights"][name]) for name in baseline["weights"])
