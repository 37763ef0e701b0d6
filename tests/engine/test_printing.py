"""What rank 0 says has lines of its own."""

from __future__ import annotations

import sys

import pytest

from ds_fp8.engine.printing import print_rank_0


def test_a_progress_bar_on_the_last_line_makes_room(capsys):
    """The Trainer's bar ends without a newline: a line printed behind it would not begin with our name."""
    tqdm = pytest.importorskip("tqdm").tqdm
    with tqdm(total=2, file=sys.stdout) as bar:
        bar.update(1)
        print_rank_0("first\nsecond")
    print_rank_0("third")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("ds_fp8:")] == [
        "ds_fp8: first",
        "ds_fp8: second",
        "ds_fp8: third",
    ]
