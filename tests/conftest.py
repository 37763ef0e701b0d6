"""What all tests share: one thread, no GPU unless asked for, and skips that name their reason.

Tests that start several processes use `run_ranks` (`tests/comm/ranks.py`).
"""

from __future__ import annotations

import os
import re

# Before torch is imported: several workers and several ranks share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` need an FP8 GPU; elsewhere they are skipped, and the summary says why."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        return
    skip = pytest.mark.skip(reason="needs a GPU with FP8 (compute capability 8.9 or newer)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


CLIENTS = ("transformers", "accelerate", "peft", "trl", "lightning", "datasets", "mpi4py", "deepspeed", "mpirun")
"""What a test may miss on a developer's machine, and never in .ci/run: the extra `test` installs them."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With DS_FP8_SKIP_IS_FAILURE (set by .ci/run) a test that was skipped for want of a client has failed."""
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """The same for a whole file."""
    return _judged((yield))


def _judged(report):
    if report.outcome != "skipped" or os.environ.get("DS_FP8_SKIP_IS_FAILURE", "") in ("", "0"):
        return report
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if re.search(rf"\b({'|'.join(CLIENTS)})\b", reason) and "GPU" not in reason:
        report.outcome = "failed"
        report.longrepr = f"skipped, which is a failure in .ci/run: {reason}\n  install the extra `test`"
    return report
