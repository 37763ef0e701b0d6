"""`fp8.compile.loss`: a Hugging Face model's loss over its vocabulary is compiled; nothing else of the model is
changed.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ds_fp8.config import CompileSettings
from ds_fp8.layers import restore_layers
from ds_fp8.layers.compiled_loss import CompiledLoss
from tests.layers.small_models import TinyModel, swapped

transformers = pytest.importorskip("transformers")


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=160, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def test_the_loss_is_compiled_with_the_blocks_and_given_back():
    model = llama()
    function = model.loss_function
    swapped(model, compile=CompileSettings())
    assert isinstance(model.loss_function, CompiledLoss)
    assert model.loss_function.function is function
    assert "_loss_function" not in vars(model.model), "the model without its head calls none"
    for copied in (copy.deepcopy(model.loss_function), pickle.loads(pickle.dumps(model.loss_function))):
        assert copied.function is function
    restore_layers(model)
    assert model.loss_function is function
    assert "_loss_function" not in vars(model)


def test_a_model_whose_name_tells_transformers_no_type_of_loss():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=160))
    swapped(model, compile=CompileSettings())
    assert isinstance(vars(model)["_loss_function"], CompiledLoss)
    assert "_loss_function" not in vars(model.transformer)


@pytest.mark.parametrize("how", [CompileSettings(loss=False), CompileSettings(regional=False)], ids=["off", "whole"])
def test_the_loss_is_left_alone(how):
    model = llama()
    swapped(model, compile=how)
    assert "_loss_function" not in vars(model)


def test_what_a_script_has_set_stays_and_so_do_other_models():
    def mine(logits, labels, vocab_size, **named):
        return logits.float().mean()

    model = llama()
    model.loss_function = mine
    swapped(model, compile=CompileSettings())
    assert model.loss_function is mine
    restore_layers(model)
    assert model.loss_function is mine
    swapped(TinyModel(), compile=CompileSettings())  # knows no loss_function
    config = transformers.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vit = transformers.ViTForImageClassification(config)
    swapped(vit, compile=CompileSettings())
    assert "_loss_function" not in vars(vit)


@pytest.mark.slow
def test_losses_and_gradients_are_the_eager_ones():
    """One graph over steps with and without `num_items_in_batch`, as Trainer gives it; sums in fp32 in another
    order.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = llama()
    function = model.loss_function
    compiled = CompiledLoss(function, None)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        logits = torch.randn(2, 16, 160, generator=generator).bfloat16().requires_grad_()
        labels = torch.randint(0, 160, (2, 16), generator=generator)
        labels[:, :3] = -100
        named = {"num_items_in_batch": torch.tensor(20 + step)} if step % 2 else {}
        found = []
        for run in (function, compiled):
            loss = run(logits=logits, labels=labels, vocab_size=160, **named)
            (gradient,) = torch.autograd.grad(loss, logits)
            found.append((loss.detach(), gradient))
        (wanted, wanted_gradient), (got, got_gradient) = found
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(got_gradient, wanted_gradient, rtol=2**-8, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_a_second_backward_through_the_same_loss():
    """`retain_graph=True`, as gradient penalties and several losses of one forward need it."""
    compiled = CompiledLoss(llama().loss_function, None)
    logits, labels = torch.randn(2, 16, 160, requires_grad=True), torch.randint(0, 160, (2, 16))
    loss = compiled(logits=logits, labels=labels, vocab_size=160)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert first.any() and torch.equal(first, second)
