"""Scripts that do more than forward, backward and step, on a GPU: our layers' fast paths, and Transformer Engine's."""

from __future__ import annotations

import pytest
from ranks import run_ranks

from tests.engine import script_jobs, test_scripts


@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_scripts_give_deepspeeds_numbers_or_an_error_with_the_name(backend, stage):
    if backend == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    cases = test_scripts.cases((stage,), thrifty=True, backend=backend)
    for found in run_ranks(1, script_jobs.several, cases, timeout_s=280, backend="cpu:gloo,cuda:nccl"):
        assert test_scripts.judge(found) == []
