"""`fuse`: the same function, the same names, the same checkpoints; and a refusal wherever that would not hold."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from layers.small_models import settings
from layers.te.test_adapter import Pair, assert_close, assert_same_state, run
from torch import nn

from ds_fp8.errors import BackendError
from ds_fp8.layers import restore_layers, swap_layers
from ds_fp8.plan import make_plan
from ds_fp8.recipe import Recipe


class TwoReaders(nn.Module):
    """The norm is read twice: by the linear layer and by the residual."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x):
        x = self.norm(x)
        return x + self.up(x)


def swapped(model: nn.Module, fuse: bool, stage: int = 2, recipe: Recipe | None = None):
    plan = make_plan(model, settings(recipe))
    fp8 = replace(plan.fp8, backend="transformer_engine", fuse=fuse)
    return swap_layers(model, replace(plan, fp8=fp8, zero_stage=stage))


def pair() -> nn.Module:
    """Pair's block as a forward that can be traced: LayerNorm -> up, RMSNorm -> down."""
    torch.manual_seed(0)
    return Pair()


@pytest.mark.parametrize("tokens", [16, 10])
def test_fused_layers_compute_what_the_two_layers_did(te, tokens):
    """Results, gradients of the norm's Parameters too, scales and histories."""
    apart, together = pair(), pair()
    fp8_state, fused_state = swapped(apart, False), swapped(together, True)
    assert type(together.up).__name__ == type(together.down).__name__ == "TELayerNormLinear"
    assert_close(run(together, 3, tokens), run(apart, 3, tokens))
    assert_same_state(fp8_state, fused_state)


def test_names_parameters_and_the_way_back(te):
    """The norm keeps its Parameters under its own name; unfused, the unmodified model computes as ever."""
    model = pair()
    baseline, parameters = copy.deepcopy(model), dict(model.named_parameters())
    swapped(model, True)
    assert list(model.state_dict()) == list(baseline.state_dict())
    assert all(value is parameters[name] for name, value in model.named_parameters())
    x = torch.randn(4, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), baseline.eval()(x)), "without FP8 a fused layer is the two unmodified ones"
    restored = restore_layers(model)
    assert [type(child) for child in restored.children()] == [nn.LayerNorm, nn.Linear, nn.RMSNorm, nn.Linear]
    assert torch.equal(restored(x), baseline(x))


def test_refused_with_the_reason_where_it_is_not_the_same_function(te):
    """What the settings alone tell (ZeRO-3, products in high precision) the plan refuses: `config/refusals.py`."""
    with pytest.raises(BackendError, match="norm: its result is read 2 times"):
        swapped(TwoReaders(), True)
    hooked = pair()
    hooked.norm.register_forward_hook(lambda module, args, output: None)
    hooked.rms.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(BackendError, match="norm has hooks"):
        swapped(hooked, True)


def test_a_refused_model_is_as_it_was(te):
    model = TwoReaders()
    with pytest.raises(BackendError):
        swapped(model, True)
    assert type(model.up) is nn.Linear and type(model.norm) is nn.LayerNorm
