"""A model that torchao has converted is not converted a second time."""

from __future__ import annotations

import pytest
from torch import nn

from ds_fp8.engine.other_fp8 import refuse_other_fp8
from ds_fp8.errors import PlanError


class Float8Linear(nn.Linear):
    """What Accelerate's backend AO leaves in a model."""

    __module__ = "torchao.float8.float8_linear"


def test_torchaos_layers_are_refused_by_name():
    model = nn.Sequential(nn.Linear(16, 16), Float8Linear(16, 16), nn.Sequential(Float8Linear(16, 16)))
    with pytest.raises(PlanError, match=r"already: 1, 2\.0\.(\n|.)*mixed_precision: bf16"):
        refuse_other_fp8(model)
    refuse_other_fp8(nn.Sequential(nn.Linear(16, 16)))


class TransformerEngineLinear(nn.Module):
    """What its backend TE leaves."""

    __module__ = "transformer_engine.pytorch.module.linear"


def test_transformer_engines_layers_are_refused_where_accelerate_put_them(monkeypatch):
    """A model that is written with them is its writer's business."""
    state = pytest.importorskip("accelerate.state", reason="needs accelerate").AcceleratorState
    model = nn.Sequential(nn.Linear(16, 16), TransformerEngineLinear())
    refuse_other_fp8(model)
    monkeypatch.setitem(state._shared_state, "_mixed_precision", "fp8")
    with pytest.raises(PlanError, match=r"Transformer Engine, by Accelerate's mixed_precision fp8(\n|.)*already: 1"):
        refuse_other_fp8(model)
    refuse_other_fp8(nn.Sequential(nn.Linear(16, 16)))


def test_the_real_class_is_where_we_look_for_it():
    torchao = pytest.importorskip("torchao.float8")
    assert torchao.float8_linear.Float8Linear.__module__.startswith("torchao.float8.")
