"""What all tests share: one thread, no GPU unless asked for, and skips that name their reason.

Tests that start several processes use `tests/ranks.py`.
"""

from __future__ import annotations

import os

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
