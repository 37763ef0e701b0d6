"""Swapping and restoring: the same Parameters, hooks, names and references; an unmodified state_dict both ways."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ds_fp8.errors import BackendError
from ds_fp8.layers import Fp8LayerNorm, Fp8Linear, Fp8RMSNorm, restore_layers, swap_layers
from ds_fp8.plan import make_plan
from tests.layers.small_models import Block, TinyModel, settings, swapped


def test_parameters_are_the_same_objects():
    """Client optimizers, parameter groups and tied weights notice nothing."""
    model = TinyModel()
    before = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    swapped(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert model.head.weight is model.embed.weight
    weight = model.blocks[0].up.weight.detach().clone()
    model(torch.randint(64, (2, 8))).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, model.blocks[0].up.weight)


def test_state_dict_is_the_unmodified_one_both_ways():
    torch.manual_seed(0)
    baseline, model = TinyModel(), TinyModel()
    swapped(model)
    model(torch.randint(64, (2, 8))).sum().backward()
    assert list(model.state_dict()) == list(baseline.state_dict())
    baseline.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(baseline.state_dict(), strict=True)
    assert sum(1 for _ in model.buffers()) == 0


def test_restore_gives_back_unmodified_layers():
    """Exactly torch's classes and numbers, no hook or attribute of ours left, and a second swap works."""
    torch.manual_seed(0)
    model = TinyModel()
    copied = copy.deepcopy(model)
    tokens = torch.randint(64, (2, 8))
    swapped(model)
    model(tokens)
    assert restore_layers(model) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in copied.modules()]
    for ours, baseline in zip(model.modules(), copied.modules(), strict=True):
        assert set(vars(ours)) == set(vars(baseline))
        assert not ours._forward_hooks and not ours._forward_pre_hooks
    assert torch.equal(model(tokens), copied(tokens))
    swapped(model)


def test_hooks_buffers_and_flags_survive():
    model = Block()
    seen = []
    handle = model.up.register_forward_hook(lambda *_: seen.append("forward"))
    model.up.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.up.register_buffer("note", torch.ones(3))
    model.up.tag = "mine"
    model.down.eval()
    up = model.up
    swapped(model)
    assert model.up is up and model.up.tag == "mine" and not model.down.training
    model(torch.randn(4, 32)).sum().backward()
    assert seen == ["forward", "backward"]
    assert "up.note" in model.state_dict()
    handle.remove()
    model(torch.randn(4, 32))
    assert seen == ["forward", "backward"]


def test_lists_of_modules_outside_the_tree_still_fit():
    """PipelineModule.forward_funcs and closures hold modules directly: they hold the FP8 layers now."""
    model = Block()
    forward_funcs = [model.up, model.down]
    swapped(model)
    assert all(isinstance(function, Fp8Linear) for function in forward_funcs)


def test_norms_are_ours_and_equal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.RMSNorm(32), nn.Linear(32, 32))
    copied = copy.deepcopy(model)
    swapped(model)
    assert type(model[0]) is Fp8LayerNorm and type(model[1]) is Fp8RMSNorm
    x = torch.randn(4, 32)
    assert torch.equal(model[:2](x), copied[:2](x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[:1](x.bfloat16()).dtype == torch.bfloat16
    mixed = model[:2](x.bfloat16())
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), copied[:2](x), rtol=2.0**-6, atol=2.0**-6)


def test_a_model_that_is_one_layer():
    model = nn.Linear(32, 32)
    fp8_state = swapped(model)
    assert isinstance(model, Fp8Linear)
    model(torch.randn(16, 32)).sum().backward()
    fp8_state.update_scales()
    assert fp8_state.forward.updates == 1
    assert type(restore_layers(model)) is nn.Linear


def test_the_wrong_model_is_refused_and_left_alone():
    plan = make_plan(TinyModel(blocks=2), settings())
    other = TinyModel(blocks=1)
    with pytest.raises(BackendError, match=r"blocks\.1\.norm, which this model does not have"):
        swap_layers(other, plan)
    assert not any(isinstance(module, Fp8Linear) for module in other.modules())
    swap_layers(model := TinyModel(), plan)
    with pytest.raises(BackendError, match="restore_layers"):
        swap_layers(model, plan)


def test_pickle_carries_scales():
    model = Block()
    fp8_state = swapped(model)
    model(torch.randn(16, 32)).sum().backward()
    fp8_state.update_scales()
    again = pickle.loads(pickle.dumps(model))
    other = again.up.layer_state.fp8_state
    assert other is again.down.layer_state.fp8_state and torch.equal(other.scales, fp8_state.scales)
    again(torch.randn(16, 32)).sum().backward()
    other.update_scales()
    assert other.forward.updates == 2
    restore_layers(again)
    assert not again._forward_hooks


def test_training_a_tied_frozen_model_converges():
    """A tied head stays in high precision, a frozen block computes in FP8, and the loss falls."""
    torch.manual_seed(0)
    model = TinyModel()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    fp8_state = swapped(model)
    assert isinstance(model.blocks[0].up, Fp8Linear) and not isinstance(model.head, Fp8Linear)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(64, (4, 17))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        fp8_state.weights_changed()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4
    assert model.blocks[0].up.weight.grad is None
