"""What delayed scaling clips far beyond its range is said once, by rank 0, whichever rank it was."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import nn

from ds_fp8.layers.clipped import WORTH_A_WORD, ClippedColumns
from ds_fp8.recipe import Recipe
from tests.engine.engine_jobs import config
from tests.engine.first_step_jobs import several
from tests.layers.small_models import swapped

SILENT = [("delayed", "none"), ("delayed", "in eval mode"), ("current", "gradient"), ("block", "batch")]


@pytest.mark.dist
def test_a_clipped_tensor_is_named_once():
    calls = [("delayed", "gradient"), ("delayed", "batch"), *SILENT]
    jobs = [
        ("clipping", (config(1, "bf16", fp8={"enabled": True, "recipe": recipe, "fp8_format": "HYBRID"}), odd))
        for recipe, odd in calls
    ]
    spoken, silent = run_ranks(2, several, jobs)
    assert not any(found["lines"] for found in silent)
    (of_gradient,), (of_batch,) = (found["lines"] for found in spoken[:2])
    assert "WARNING: step 3: the grad_output of layer was " in of_gradient and "recipe delayed" in of_gradient
    assert "WARNING: step 3: the input of layer was " in of_batch
    assert not any(found["lines"] for found in spoken[2:])


def test_what_cannot_be_clipped_is_not_looked_at():
    """Tensors without history, and weights, which have their own scale then."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    fp8_state, columns, x = swapped(model, Recipe(), managed=True), ClippedColumns(), torch.ones(16, 32)
    model(x).sum().backward()
    assert columns.largest(fp8_state.tensors)[0] == 0
    fp8_state.update_scales()
    model(x).sum().backward()
    assert columns.largest(fp8_state.tensors)[0] == pytest.approx(1, rel=0.01)
    with torch.no_grad():
        model[1].weight *= 100
    model(x)
    assert columns.largest(fp8_state.tensors)[0] == pytest.approx(1, rel=0.01)
    model(x * 64)
    excess, column = columns.largest(fp8_state.tensors).tolist()
    assert excess == pytest.approx(64, rel=0.01) and excess > WORTH_A_WORD
    assert fp8_state.layer_state("0").input_column == column
