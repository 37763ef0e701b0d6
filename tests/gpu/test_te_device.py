"""The real Transformer Engine behind our adapter, on the device, against the torch backend on the same data.

Scales and histories of the first layer are equal to the bit (same inputs); behind it an amax is a sum of products that
two GEMMs add in different orders, and outputs agree within FP8 accumulation: a flipped code moves one product by 2^-3.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformer_engine")

from layers.small_models import settings

from ds_fp8.layers import restore_layers, swap_layers
from ds_fp8.plan import make_plan
from ds_fp8.recipe import HighPrecision, Recipe


class Pair(nn.Module):
    def __init__(self, recompute=None):
        super().__init__()
        self.up, self.norm = nn.Linear(128, 256), nn.LayerNorm(256)
        self.rms, self.down = nn.RMSNorm(256, eps=1e-6), nn.Linear(256, 128, bias=False)
        self.recompute = recompute

    def forward(self, x):
        if self.recompute is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.recompute)

    def block(self, x):
        return x + self.down(self.rms(self.norm(self.up(x))))


def both_backends(recipe=None, recompute=None, **fp8):
    torch.manual_seed(0)
    model = Pair(recompute).to("cuda", torch.bfloat16)
    found = []
    for backend in ("torch", "transformer_engine"):
        copied = copy.deepcopy(model)
        plan = make_plan(copied, settings(recipe, **fp8), device="cuda")
        found.append((copied, swap_layers(copied, replace(plan, fp8=replace(plan.fp8, backend=backend)))))
    return found


def run(model, steps=3, tokens=32):
    generator = torch.Generator().manual_seed(5)
    for index in range(steps):
        x = (torch.randn(tokens, 128, generator=generator) * (index + 1)).to("cuda", torch.bfloat16).requires_grad_()
        model.zero_grad()
        output = model(x)
        output.backward(torch.linspace(-1, 1, 128, device="cuda", dtype=torch.bfloat16).expand_as(output).contiguous())
    return [output.detach(), x.grad] + [parameter.grad for parameter in model.parameters()]


def assert_near(found, wanted, bound=0.05):
    for one, other in zip(found, wanted, strict=True):
        error = (one.float() - other.float()).norm() / other.float().norm()
        assert error < bound, f"relative error {float(error):.4f}"


RECIPES = [Recipe(amax_history_len=4), Recipe(amax_history_len=4, fp8_format="E4M3", amax_compute_algo="most_recent"),
           Recipe(amax_history_len=4, interval=2, margin=1), Recipe(kind="current"), Recipe(kind="block")]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_agrees_with_the_torch_backend(recipe):
    (ours, fp8_state), (theirs, their_state) = both_backends(recipe)
    assert_near(run(theirs), run(ours))
    if recipe.keeps_history:
        for one in (fp8_state, their_state):
            one.update_scales()
        layer_state = fp8_state.layer_state("up")
        columns = [layer_state.input_column, layer_state.weight_column]
        assert torch.equal(fp8_state.scales[columns], their_state.scales[columns])
        assert torch.equal(fp8_state.forward.history[:, columns], their_state.forward.history[:, columns])
        torch.testing.assert_close(fp8_state.scales, their_state.scales, rtol=0.05, atol=0)
        torch.testing.assert_close(fp8_state.backward.history, their_state.backward.history, rtol=0.05, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_leaves_the_same_histories(reentrant):
    _, (baseline, fp8_state) = both_backends()
    _, (theirs, their_state) = both_backends(recompute=reentrant)
    assert_near(run(theirs), run(baseline), bound=1e-6)
    for one in (fp8_state, their_state):
        one.update_scales()
    assert torch.equal(fp8_state.scales, their_state.scales)
    assert torch.equal(fp8_state.forward.history, their_state.forward.history)
    assert torch.equal(fp8_state.backward.history, their_state.backward.history)


@pytest.mark.parametrize("name", ["fprop", "dgrad", "wgrad"])
def test_override_linear_precision(name):
    recipe = Recipe(amax_history_len=4, override_linear_precision=HighPrecision(**{name: True}))
    (ours, _), (theirs, _) = both_backends(recipe)
    assert_near(run(theirs), run(ours))


@pytest.mark.parametrize("tokens", [1, 8, 24, 33])
def test_any_number_of_tokens(tokens):
    (ours, _), (theirs, _) = both_backends()
    assert_near(run(theirs, tokens=tokens), run(ours, tokens=tokens))


def test_weight_cache_changes_nothing_within_a_step():
    _, (cached, _) = both_backends(Recipe(kind="current"), weight_cache=True)
    _, (fresh, _) = both_backends(Recipe(kind="current"), weight_cache=False)
    assert_near(run(cached), run(fresh), bound=1e-6)


def test_names_and_the_way_back():
    _, (theirs, fp8_state) = both_backends()
    run(theirs)
    assert not [name for name in theirs.state_dict() if "extra_state" in name]
    saved = fp8_state.state_dict()
    assert fp8_state.load_state_dict(saved) == []
    x = torch.randn(32, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        before = theirs.eval()(x)
        baseline = restore_layers(theirs)
        assert type(baseline.up) is nn.Linear and type(baseline.norm) is nn.LayerNorm
        assert_near([before], [baseline(x)], bound=0.01)


def test_fused_norm_and_linear_are_the_two_layers():
    """te.LayerNormLinear normalises in fp32 and casts at once, so it differs by the 16-bit rounding of the norm's
    result.
    """
    torch.manual_seed(0)
    results = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = Fusable().to("cuda", torch.bfloat16)
        plan = make_plan(model, settings(Recipe(kind="current")), device="cuda")
        fp8 = replace(plan.fp8, backend="transformer_engine", fuse=fuse)
        swap_layers(model, replace(plan, fp8=fp8, zero_stage=2))
        results.append(run(model))
    assert_near(*results)


class Fusable(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(128), nn.Linear(128, 256)
        self.rms, self.down = nn.RMSNorm(256, eps=1e-6), nn.Linear(256, 128, bias=False)

    def forward(self, x):
        return x + self.down(self.rms(self.up(self.norm(x))))
