"""Before ranks meet in a collective: whoever lacks the section is named, in the store, with a time limit."""

from __future__ import annotations

import contextlib
import io
import time

import pytest
from ranks import run_ranks

from ds_fp8.engine import startup_check
from ds_fp8.errors import PlanError

pytestmark = pytest.mark.dist


def outcome(meet) -> str:
    """What was printed, and the error."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            meet()
        except PlanError as error:
            return said.getvalue() + str(error)
    return said.getvalue()


def scenes(rank: int, world_size: int) -> dict[str, str]:
    """Four engines in a row, each met in another way."""
    from torch import distributed as dist

    found = {"all here": outcome(startup_check.gather_ranks)}

    if rank == 1:
        found["unmodified first"] = outcome(startup_check.pass_by)
    dist.barrier()
    if rank == 0:
        found["unmodified first"] = outcome(startup_check.gather_ranks)

    if rank == 0:
        found["unmodified last"] = outcome(startup_check.gather_ranks)
    else:
        here = startup_check._StartupCheck(
            dist.distributed_c10d._get_default_store(), "ds_fp8/engine2", rank, world_size
        )
        while not here.count():
            time.sleep(0.01)
        found["unmodified last"] = outcome(startup_check.pass_by)

    startup_check.NOTICE_S, startup_check.PATIENCE_S = 0.2, 1.0
    found["absent"] = "" if rank == 1 else outcome(startup_check.gather_ranks)
    dist.barrier()
    return found


def test_ranks_that_lack_the_section_are_named():
    """Rank 1's JSON has no section of ours, seen from both sides and in both orders; or rank 1 has no plugin and says
    nothing.
    """
    first, second = run_ranks(2, scenes)
    assert first["all here"] == second["all here"] == ""
    ours = "rank 1 made a DeepSpeed engine without an fp8 or msamp section; rank 0 has one."
    theirs = "rank 1 made a DeepSpeed engine without an fp8 or msamp section; 1 other has one."
    assert first["unmodified first"].startswith(ours) and first["unmodified last"].startswith(ours)
    assert second["unmodified first"] == "" and second["unmodified last"].startswith(theirs)
    notice, error, cure = first["absent"].splitlines()
    assert notice == "ds_fp8: waiting for rank 1 to make the same DeepSpeed engine"
    assert error.startswith("rank 1 did not come within 1 s, so rank 0 stops") and "ds_fp8 doctor" in cure
