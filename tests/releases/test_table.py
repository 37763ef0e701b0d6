"""docs/compatibility.md is what the matrix found: nothing is left out of it, and nothing is called ok that was not
run.
"""

from __future__ import annotations

from ds_fp8.releases import FAULTS, RELEASED
from tests.releases import table

MEANINGS = {"DeepSpeed alone": "by itself", "O1": "bit for bit"}


def result(release: str, **wrong: str) -> dict:
    return {
        "deepspeed": release,
        "versions": "Python 3.11, torch 2.13",
        "features": dict.fromkeys(MEANINGS, "") | wrong,
    }


def test_every_failure_is_on_the_page():
    """A feature that fails, one that was not run, a release that was not tried, and DeepSpeed's own fault."""
    broken = FAULTS[0].first
    results = [
        result("0.19.8"),
        result("0.19.7", O1="AssertionError: weights differ\nmore"),
        result(broken, **{"DeepSpeed alone": "RuntimeError: a view"}),
        {"deepspeed": "0.19.6", "features": {}, "error": "did not finish"},
    ]
    text = table.page(results, MEANINGS)
    assert "| 0.19.8 | ok | ok |" in text and "| 0.19.7 | ok | FAILS |" in text
    assert "| 0.19.6 | not run | not run |" in text and "- 0.19.6, run: did not finish" in text
    assert f"| {broken} | fails by itself | ok |" in text and FAULTS[0].what in text
    assert "- 0.19.7, O1: AssertionError: weights differ\n" in text
    absent = next(line for line in text.splitlines() if "were not run" in line)
    assert all((release in absent) == (release not in ("0.19.8", "0.19.7", "0.19.6", broken)) for release in RELEASED)
    assert [bool(table.failures(one)) for one in results] == [False, True, False, True]


def test_a_line_tells_the_outcome():
    """What .ci/run prints for a release."""
    assert table.line(result("0.18.0")).endswith("2 of 2 features ok")
    assert "1 of 2 features ok; O1 FAILS: no" in table.line(result("0.18.0", O1="no"))


def test_adapters_are_small():
    """What a line of releases costs: fewer than 60 lines each, and each says in a sentence what it holds."""
    for last, (count, held) in table.adapter_lines().items():
        assert count < 60, f"{last}: {count} lines"
        assert held, last
