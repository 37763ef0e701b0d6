"""Every preset really trains: the real DeepSpeed, two ranks, the JSON as it stands but for batch size and warm-up."""

from __future__ import annotations

import math

import pytest
from ranks import run_ranks

from tests.configs.preset_jobs import train_presets
from tests.configs.test_presets import FILES

GROUPS = ("fp8_", "msamp_", "ms_amp_", "accelerate_")
"""Presets of a group share their processes, since starting those is what takes time."""


@pytest.mark.dist
@pytest.mark.parametrize("prefix", GROUPS)
def test_presets_train(prefix):
    """The loss of a small net falls over twelve steps, finite throughout, and layers are swapped where JSON says so.

    Nothing is asked of `ms_amp_plain`: its msamp section is disabled, so it is DeepSpeed alone.
    """
    names = [str(file) for file in FILES if file.stem.startswith(prefix)]
    for found in run_ranks(2, train_presets, names):
        assert len(found) == len(names)
        for name, job in found.items():
            assert all(math.isfinite(loss) for loss in job["losses"]), (name, job["losses"])
            if name == "ms_amp_plain":
                assert not job["attached"]
                continue
            assert job["attached"], name
            assert "Fp8Linear" in job["kinds"], (name, job["kinds"])
            assert job["losses"][-1] < job["losses"][0], (name, job["losses"])
