"""Saving and restoring the FP8 state: exact, by name, and refused as a whole when it is not ours."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from ds_fp8.errors import CheckpointError
from ds_fp8.layers import ModelFp8State
from ds_fp8.recipe import Recipe
from tests.layers.small_models import TinyModel, columns, swapped

TENSORS = ("scales", "forward_history", "backward_history")


def trained(steps: int, seed: int = 0, recipe: Recipe | None = None) -> tuple[nn.Module, ModelFp8State]:
    torch.manual_seed(seed)
    model = TinyModel()
    fp8_state = swapped(model, recipe)
    train(model, fp8_state, range(steps))
    return model, fp8_state


def train(model: nn.Module, fp8_state: ModelFp8State, steps: range) -> list[torch.Tensor]:
    losses = []
    for step in steps:
        tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        fp8_state.weights_changed()
        losses.append(loss.detach())
    return losses


def saved(state: dict) -> dict:
    """Through a file, as safely as the strictest checkpoint engine."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def test_resume_is_bit_exact():
    """Three steps, save, three more: the same losses whether or not the process was replaced in between."""
    model, fp8_state = trained(3)
    weights, state = {key: value.clone() for key, value in model.state_dict().items()}, saved(fp8_state.state_dict())
    expected = train(model, fp8_state, range(3, 6))
    fresh, other = trained(0, seed=1)
    fresh.load_state_dict(weights, strict=True)
    assert other.load_state_dict(state) == []
    assert torch.equal(torch.stack(train(fresh, other, range(3, 6))), torch.stack(expected))
    assert all(torch.equal(fp8_state.state_dict()[key], other.state_dict()[key]) for key in TENSORS)
    assert other.steps == fp8_state.steps == 6


def test_saving_does_not_disturb_training():
    quiet, loud = trained(0), trained(0)
    for step in range(4):
        train(*quiet, range(step, step + 1))
        train(*loud, range(step, step + 1))
        loud[1].state_dict()
    assert all(torch.equal(quiet[1].state_dict()[key], loud[1].state_dict()[key]) for key in TENSORS)


def test_layers_are_matched_by_name():
    """Other layers in FP8 now: known ones keep their scales, new ones start fresh, and both are reported."""
    _, fp8_state = trained(3)
    state = fp8_state.state_dict()
    other = ModelFp8State(["new.layer", "blocks.1.up"], fp8_state.plan)
    notes = other.load_state_dict(state)
    assert len(notes) == 2 and "new.layer" in notes[0] and "blocks.0.up" in notes[1]
    for key in ("forward_scale", "forward_history", "backward_scale", "backward_history"):
        assert torch.equal(columns(other, "blocks.1.up")[key], columns(fp8_state, "blocks.1.up")[key])
        assert torch.equal(
            columns(other, "new.layer")[key], torch.full_like(columns(other, "new.layer")[key], "scale" in key)
        )


@pytest.mark.parametrize("length", [1, 3, 8])
def test_a_history_of_another_length_keeps_the_newest(length):
    _, fp8_state = trained(6)
    other = ModelFp8State(fp8_state.names, type(fp8_state.plan)(recipe=Recipe(amax_history_len=length)))
    notes = other.load_state_dict(fp8_state.state_dict())
    assert len(notes) == 1 and f"now {length}" in notes[0]
    kept = min(length, 4) - 1
    assert not other.forward.history[0].any()
    assert torch.equal(other.forward.history[length - kept :], fp8_state.forward.history[4 - kept :])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda state: state.pop("version"), "not written by ds_fp8"),
        (lambda state: state.update(version=99), "version 99"),
        (lambda state: state.pop("forward_history"), "truncated: forward_history"),
        (lambda state: state.update(scales=state["scales"][:-1]), "damaged: scales"),
        (lambda state: state.update(scales=state["scales"] * float("nan")), "not finite"),
    ],
    ids=["foreign", "newer", "truncated", "damaged", "not finite"],
)
def test_a_bad_state_changes_nothing(damage, message):
    _, fp8_state = trained(3)
    state, before = fp8_state.state_dict(), fp8_state.state_dict()
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        fp8_state.load_state_dict(state)
    assert all(torch.equal(before[key], fp8_state.state_dict()[key]) for key in TENSORS)
