"""The gradient norm that a job reports, and the factor it clips with, are fp32's within 3 %: every stage and level.

The wire casts gradients to e4m3, so the norm of what arrives is not that of what was sent; and a norm taken of a part,
or before the mean over ranks, would be wrong by far more than the casts are.
"""

from __future__ import annotations

import pytest
from norm_jobs import LEVELS, MAX_NORM, cases, errors, measure
from ranks import run_ranks

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def rows():
    return run_ranks(2, measure, [case for case in cases() if case[1] != "bf16"], 3)


@pytest.mark.parametrize("case", [case for case in cases() if case[1] != "bf16"], ids=str)
def test_norm_and_clipping_are_those_of_fp32(rows, case):
    for of_rank in rows:
        row = next(row for row in of_rank if (row["stage"], row["level"]) == case)
        assert min(row["true"]) > 10 * MAX_NORM
        assert max(errors(row["reported"], row["true"])) < 0.03
        assert max(errors(row["applied"], row["due"])) < 0.03


def test_ranks_report_the_same(rows):
    assert [row["reported"] for row in rows[0]] == [row["reported"] for row in rows[1]]
    assert {row["level"] for row in rows[0]} == set(LEVELS) - {"bf16"}
