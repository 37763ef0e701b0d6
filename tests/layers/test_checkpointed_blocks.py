"""`fp8.compile` and Transformers' activation checkpointing: what is checkpointed is compiled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from ds_fp8.config import CompileSettings
from ds_fp8.layers import restore_layers
from ds_fp8.layers.blocks import CHECKPOINT, CompiledInside
from tests.layers.small_models import swapped
from tests.layers.test_compiled_loss import llama


def checkpointed(use_reentrant: bool):
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_block_is_compiled(use_reentrant):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, model = checkpointed(use_reentrant), checkpointed(use_reentrant)
    swapped(eager)
    swapped(model, compile=CompileSettings(loss=False))
    words = torch.randint(0, 160, (2, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for one in (eager, model):
        for _ in range(2):
            loss = one(input_ids=words, labels=words).loss
            loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    captured = torch._dynamo.utils.counters["stats"]["calls_captured"]
    assert captured > 40, "blocks of seven linear layers, two norms and an attention"
    assert all(a.grad is not None and torch.isfinite(a.grad).all() for a in model.parameters() if a.requires_grad)


def test_the_block_is_given_back_and_can_be_copied():
    model = checkpointed(False)
    before = getattr(model.model.layers[0], CHECKPOINT)
    swapped(model, compile=CompileSettings())
    inside = getattr(model.model.layers[0], CHECKPOINT)
    assert isinstance(inside, CompiledInside) and inside.checkpoint is before
    assert isinstance(pickle.loads(pickle.dumps(inside)), CompiledInside)
    copy.deepcopy(model)
    restore_layers(model)
    assert getattr(model.model.layers[0], CHECKPOINT) is before


@pytest.mark.slow
def test_layers_that_checkpoint_inside_of_repeated_stacks():
    """T5's encoder and decoder are siblings of one class; what is checkpointed are their layers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    losses = []
    words = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for how in (None, CompileSettings(loss=False)):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(config).bfloat16().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        swapped(model, compile=how)
        for _ in range(2):
            loss = model(input_ids=words, labels=words, use_cache=False).loss
            loss.backward()
        losses.append(loss.detach().float())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 40
    assert all(isinstance(getattr(one, CHECKPOINT), CompiledInside) for one in model.encoder.block)
    restore_layers(model)
    assert not any(isinstance(vars(one).get(CHECKPOINT), CompiledInside) for one in model.modules())
