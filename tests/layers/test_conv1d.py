"""GPT-2's Conv1D computes what an Fp8Linear with the transposed weight computes; names and shapes stay."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ds_fp8.layers import restore_layers
from ds_fp8.layers.matrix_layer import Fp8MatrixLayer
from ds_fp8.plan import make_plan
from ds_fp8.recipe import Recipe
from tests.layers.small_models import settings, swapped

transformers = pytest.importorskip("transformers")


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config).train()


def step(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), {fqn: p.grad.clone() for fqn, p in model.named_parameters()}


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_the_same_numbers_as_a_linear_layer_with_the_transposed_weight(recipe):
    torch.manual_seed(0)
    conv, linear = transformers.pytorch_utils.Conv1D(48, 32), nn.Linear(32, 48)
    linear.load_state_dict({"weight": conv.weight.t(), "bias": conv.bias})
    models = [nn.Sequential(conv), nn.Sequential(linear)]
    outputs = []
    for model in models:
        swapped(model, Recipe(kind=recipe))
        x = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        for _ in range(2):  # the second forward has a history
            model.zero_grad()
            out = model(x)
            out.square().sum().backward()
        outputs.append((out, x.grad, model[0].weight.grad, model[0].bias.grad))
    (out_a, x_a, weight_a, bias_a), (out_b, x_b, weight_b, bias_b) = outputs
    assert torch.equal(out_a, out_b) and torch.equal(x_a, x_b) and torch.equal(bias_a, bias_b)
    assert torch.equal(weight_a, weight_b.t())


def test_gpt2_is_converted_and_given_back():
    """Eight Conv1D of two blocks; before, a GPT-2 was refused: nothing would compute in FP8."""
    model = gpt2()
    names, (exact, _) = list(model.state_dict()), step(model)
    plan = make_plan(model, settings())
    assert "8 of 8 Conv1D -> Fp8Conv1D (HYBRID, delayed" in plan.banner()
    assert plan.decision("transformer.h.0.attn.c_attn").shape == (96, 32), "(out, in), as of a Linear"
    swapped(model)
    loss, _ = step(model)
    assert loss != exact and loss == pytest.approx(exact, rel=0.01)
    assert list(model.state_dict()) == names
    restore_layers(model)
    assert not any(isinstance(module, Fp8MatrixLayer) for module in model.modules())
    assert step(model)[0] == exact


def test_copies_and_pickles():
    model = gpt2()
    swapped(model, Recipe(kind="current"))
    expected, _ = step(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert step(copied)[0] == expected
        assert sum(isinstance(module, Fp8MatrixLayer) for module in copied.modules()) == 8


def test_saved_and_loaded_by_unmodified_transformers(tmp_path):
    model = gpt2()
    swapped(model)
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_falcons_linear_is_converted_and_given_back():
    """A subclass of nn.Linear with a forward of its own, the same product: all were kept, and the model refused."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, attention_dropout=0, hidden_dropout=0))
    exact, exact_gradients = step(model.train())
    plan = make_plan(model, settings(Recipe(kind="current")))
    assert "4 of 4 FalconLinear -> Fp8FalconLinear" in plan.banner()
    swapped(model, Recipe(kind="current"))
    loss, gradients = step(model)
    assert loss != exact and loss == pytest.approx(exact, rel=0.01)
    name = "transformer.h.0.mlp.dense_h_to_4h.weight"
    error = (gradients[name] - exact_gradients[name]).norm() / exact_gradients[name].norm()
    assert 1e-3 < error < 0.15
    restore_layers(model)
    assert step(model)[0] == exact
