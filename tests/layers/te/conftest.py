"""The fake Transformer Engine, for each test of this folder, with our caches emptied before and after."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from ds_fp8.layers.transformer_engine import linear, names, norm_linear, norms

_spec = importlib.util.spec_from_file_location("fake_te", Path(__file__).parent / "fake_te.py")
assert _spec is not None and _spec.loader is not None
fake_te = importlib.util.module_from_spec(_spec)
sys.modules["fake_te"] = fake_te
_spec.loader.exec_module(fake_te)


def _forget() -> None:
    names.load.cache_clear()
    names.quantized_class.cache_clear()
    linear.linear_class.cache_clear()
    norms.norm_class.cache_clear()
    norm_linear.norm_linear_class.cache_clear()
    norm_linear.passing_class.cache_clear()


@pytest.fixture
def te(monkeypatch):
    """transformer_engine.pytorch of the fake."""
    _forget()
    yield fake_te.install(monkeypatch)
    _forget()
