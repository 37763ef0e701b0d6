"""The support matrix holds: what `features.py` says of each cell is what happens, and `docs/support.md` says the
same.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "support.md"


def unexpected(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, str(HERE / "run.py"), *arguments], capture_output=True, text=True)
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["unexpected"]


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_the_quick_rows():
    """The rows that are marked quick, each absent, fp8, O1, O2, O3."""
    assert unexpected("--quick") == []


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_checkpoints_that_deepspeed_alone_cannot_load():
    """Elastic ones of torch's Adam, and torch's Adagrad in a new engine of ZeRO 3: refused by name, not a raw error."""
    assert unexpected("elastic_checkpoint, save and resume", "Adagrad, save and resume, ZeRO 3") == []


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("DS_FP8_SUPPORT_ALL"), reason="a quarter of an hour: DS_FP8_SUPPORT_ALL=1")
def test_every_row():
    assert unexpected() == []


def test_the_page_has_every_row():
    """Written by run.py from the same table; a row that was not run is named as such."""
    spec = importlib.util.spec_from_file_location("support_features", HERE / "features.py")
    features = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = features
    spec.loader.exec_module(features)
    text = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+) \|$", text, re.M))
    waiting = text.partition("Rows that were not run")[2]
    for name, feature in features.FEATURES.items():
        if name not in rows:
            assert name in waiting, f"{name}: write the page anew"
            continue
        for column, cell in zip(features.COLUMNS, rows[name].split(" | "), strict=True):
            wanted = (
                "refused"
                if column in feature.refused
                else "as alone"
                if feature.alone and column not in feature.runs
                else "works"
            )
            assert cell.startswith(wanted), f"{name}, {column}: {cell}"
