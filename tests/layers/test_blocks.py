"""`fp8.compile`: which modules are compiled, and that the model is otherwise as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ds_fp8.config import CompileSettings
from ds_fp8.layers import restore_layers
from ds_fp8.layers.blocks import repeated_blocks
from ds_fp8.layers.compiled_forms import FORMS
from ds_fp8.plan import Plan, make_plan
from tests.layers.small_models import Block, TinyModel, settings, swapped


def compiled_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if FORMS in vars(module)]


class EncoderDecoder(nn.Module):
    """Blocks in two lists, each with its own repeated parts inside; and an adapter that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
        self.decoder = nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()))
        self.adapter = Block()


def linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_blocks_are_the_outermost_siblings_of_one_class():
    model = EncoderDecoder()
    assert list(repeated_blocks(model, linears(model))) == [
        "encoder.layers.0",
        "encoder.layers.1",
        "decoder.0",
        "decoder.1",
    ]


def test_blocks_without_converted_layers_are_left_alone():
    model = EncoderDecoder()
    converted = {name for name in linears(model) if not name.startswith("encoder")}
    assert list(repeated_blocks(model, converted)) == ["decoder.0", "decoder.1"]


def test_compile_is_undone_with_the_layers():
    """Names, parameters and the modules themselves stay; after `restore_layers` the model is called as before."""
    model = TinyModel()
    names, modules = list(model.state_dict()), list(model.modules())
    swapped(model, compile=CompileSettings())
    assert compiled_in(model) == ["blocks.0", "blocks.1"]
    assert list(model.state_dict()) == names
    assert list(model.modules()) == modules
    copy.deepcopy(model)
    restore_layers(model)
    assert not compiled_in(model)
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.parametrize(
    ("model", "how", "names"),
    [
        (TinyModel(), CompileSettings(regional=False), [""]),
        (nn.Sequential(nn.Linear(32, 32)), CompileSettings(), [""]),
    ],
    ids=["regional false", "nothing repeats"],
)
def test_the_whole_model(model, how, names):
    swapped(model, compile=how)
    assert compiled_in(model) == names


def test_what_its_owner_compiled_stays_his():
    model = TinyModel()
    model.blocks[0].compile(backend="eager")
    swapped(model, compile=CompileSettings())
    assert compiled_in(model) == ["blocks.1"]
    restore_layers(model)
    assert model.blocks[0]._compiled_call_impl is not None


def test_mode_and_dynamic_reach_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: asked.append(how))
    swapped(TinyModel(), compile=CompileSettings(mode="max-autotune", dynamic=True))
    swapped(TinyModel(), compile=CompileSettings())
    assert asked == [{"mode": "max-autotune", "dynamic": True}] * 2 + [{"mode": None, "dynamic": None}] * 2


def test_the_plan_tells_and_survives_json():
    plan = make_plan(TinyModel(), settings(compile=CompileSettings(mode="reduce-overhead")))
    assert "repeated blocks compiled by torch.compile, reduce-overhead" in plan.banner()
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.slow
def test_training_goes_on_in_compiled_blocks():
    """With Inductor: equal blocks are compiled once, and losses follow the eager ones."""
    losses = []
    for how in (None, CompileSettings()):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = TinyModel()
        fp8_state = swapped(model, compile=how)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
        found = []
        for _ in range(4):
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            fp8_state.weights_changed()
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert len(set(losses[0])) == 4, "each step moved the weights"
