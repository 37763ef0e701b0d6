"""The stand-in in place of Transformer Engine, for each test of this folder, with our caches emptied before and after."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from ds_fp8.layers.transformer_engine import linear, names, norm_linear, norms

_spec = importlib.util.spec_from_file_location("te_stand_in", Path(__file__).parent / "stand_in.py")
assert _spec is not None and _spec.loader is not None
stand_in = importlib.util.module_from_spec(_spec)
sys.modules["te_stand_in"] = stand_in
_spec.loader.exec_module(stand_in)


def _forget() -> None:
    names.load.cache_clear()
    names.codes_class.cache_clear()
    linear.linear_class.cache_clear()
    norms.norm_class.cache_clear()
    norm_linear.norm_linear_class.cache_clear()
    norm_linear.passing_class.cache_clear()


@pytest.fixture
def te(monkeypatch):
    """transformer_engine.pytorch of the stand-in."""
    _forget()
    yield stand_in.install(monkeypatch)
    _forget()
