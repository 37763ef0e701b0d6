"""Everything in this folder needs a CUDA device with FP8 products; elsewhere it is skipped with that reason."""

from __future__ import annotations

import pytest
import torch


def _reason() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 9):
        return "this device has no FP8 products (compute capability 8.9 or higher)"
    return None


def pytest_collection_modifyitems(items):
    reason = _reason()
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report):
    """A failure is printed when it happens: time on a GPU is lent, and a run that is cut off prints no summary."""
    if report.failed and "gpu" in report.fspath.split("/"):
        print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)
