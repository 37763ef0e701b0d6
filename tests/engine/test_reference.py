"""Engines without an optimizer, made from the JSON of one that has one, as RLHF libraries do."""

from __future__ import annotations

import pytest
from ranks import run_ranks

from tests.engine.engine_jobs import config
from tests.engine.reference_jobs import several

pytestmark = pytest.mark.dist


def sections(level=None, **fp8):
    """Our part of a JSON; without arguments of `fp8`, msamp brings the layers along."""
    result = {"fp8": {"enabled": True, **fp8}} if fp8 or level is None else {}
    return {**result, **({"msamp": {"enabled": True, "opt_level": level}} if level else {})}


def test_a_reference_rounds_as_its_policy_does():
    """Same weights, same batch: the loss of both is one number, which bf16's is not. A delayed policy's first step
    takes each scale from the tensor itself, as a reference always does.

    The reference stays as it is while the policy learns, at every level and stage; O3's copy is one of stage 0 too,
    where O3 itself would be refused. A misspelt key of msamp is refused there as well.
    """
    jsons = [
        config(1, **sections(recipe="current")),
        config(2, **sections("O3", recipe="block")),
        config(3, **sections("O3", recipe="current")),
        config(2, **sections("O3")),
        config(0, **sections("O2")),
        config(2, **sections("O2", eval=False)),
        config(2, fp8={"enabled": False}, msamp={"enabled": True, "opt_level": "O2"}),
    ]
    bad = config(2, msamp={"enabled": True, "exp_avgg": "fp16"})
    calls = [*(("reference", (settings,)) for settings in jsons), ("refused", (bad,))]
    *results, errors = zip(*run_ranks(2, several, calls))
    for found in (one for pair in results for one in pair):
        assert found["before"] == found["after"]
        assert found["losses"][-1] < found["policy"]
    for found in (one for pair in results[:5] for one in pair):
        assert found["before"] == found["policy"] != found["unmodified"]
    for found in (one for pair in results[3:5] for one in pair):
        assert found["recipe"] == "current"
    for found in (one for pair in results[5:] for one in pair):
        assert found["before"] == found["unmodified"], "fp8/eval false, or no FP8 layers at all"
    for (shown, silent), settings in zip(results, jsons):
        nothing_to_do = "no optimizer, so msamp has nothing to do"
        assert shown["said"].count(nothing_to_do) == ("msamp" in settings) and "ds_fp8" not in silent["said"]
    assert all("did you mean 'exp_avg'" in error for error in errors)
