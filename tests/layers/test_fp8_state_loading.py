"""`match_state`: a saved FP8 state is put into the columns of today's layers by name, or refused before anything
moves.
"""

from __future__ import annotations

import pytest
import torch
from layers.small_models import settings
from torch import nn

from ds_fp8.errors import CheckpointError
from ds_fp8.layers import ModelFp8State, swap_layers
from ds_fp8.layers.fp8_state import VERSION
from ds_fp8.layers.fp8_state_loading import match_state
from ds_fp8.plan import make_plan
from ds_fp8.recipe import Recipe


def fp8_state(*names: str, length: int = 4) -> ModelFp8State:
    """The state of a model of FP8 Linears with these names."""
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in names})
    plan = make_plan(model, settings(Recipe(amax_history_len=length)), device="cpu", world_size=1)
    found = swap_layers(model, plan, managed=True)
    assert found is not None
    return found


def saved(*names: str, length: int = 4) -> dict:
    """As a checkpoint has it: column c has the scale c + 1, and c + 1 in the newest row of its history."""
    count = len(names)
    columns = torch.arange(1.0, 3 * count + 1)
    forward, backward = torch.zeros(length, 2 * count), torch.zeros(length, count)
    forward[-1], backward[-1] = columns[: 2 * count], columns[2 * count :]
    return {
        "version": VERSION, "names": list(names), "recipe": {}, "steps": 3, "forward_folds": 3, "backward_folds": 3,
        "scales": columns, "known": torch.ones(3 * count, dtype=torch.bool),
        "forward_history": forward, "backward_history": backward, "pending": columns / 2,
    }  # fmt: skip


def test_the_same_layers_get_every_column_back():
    tensors, pending, notes = match_state(saved("a", "b"), fp8_state("a", "b"))
    assert tensors["scales"].tolist() == [1, 2, 3, 4, 5, 6] and tensors["known"].all() and notes == []
    assert pending.tolist() == [0.5, 1, 1.5, 2, 2.5, 3]
    assert tensors["forward_history"][-1].tolist() == [1, 2, 3, 4]
    assert tensors["backward_history"][-1].tolist() == [5, 6]


def test_columns_follow_the_names_and_not_the_order():
    """Two columns of the forward for each layer, one of the backward behind all of them: b, a is 3 4 1 2, 6 5."""
    tensors, pending, notes = match_state(saved("a", "b"), fp8_state("b", "a"))
    assert tensors["scales"].tolist() == [3, 4, 1, 2, 6, 5] and notes == []
    assert pending.tolist() == [1.5, 2, 0.5, 1, 3, 2.5]


def test_a_layer_without_saved_scales_starts_fresh_and_one_too_many_is_named():
    tensors, pending, notes = match_state(saved("a", "gone"), fp8_state("a", "new"))
    assert tensors["scales"].tolist() == [1, 2, 1, 1, 5, 1]
    assert tensors["known"].tolist() == [True, True, False, False, True, False]
    assert pending[2:4].tolist() == [0, 0]
    assert [note for note in notes if "new" in note] and [note for note in notes if "gone" in note]


@pytest.mark.parametrize(("length", "kept"), [(2, [0, 3]), (4, [0, 1, 2, 3]), (6, [0, 0, 0, 1, 2, 3])])
def test_of_a_history_of_another_length_the_newest_stay(length, kept):
    """Row 0 is the open slot, the newest amax is the last row."""
    state = saved("a")
    state["backward_history"] = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    tensors, _, notes = match_state(state, fp8_state("a", length=length))
    assert tensors["backward_history"][:, 0].tolist() == kept
    assert bool(notes) == (length != 4)


def test_infinities_of_older_versions_leave_the_history():
    """Under today's rules a scale would stand still until they had rolled out."""
    state = saved("a")
    state["forward_history"][2, 0] = float("inf")
    tensors, _, _ = match_state(state, fp8_state("a"))
    assert tensors["forward_history"][2, 0] == 0


def test_a_state_from_before_known_shows_it_by_its_scales():
    """Until 0.1.0 a column that had never been renewed had the scale 1, as the first one here."""
    state = saved("a")
    del state["known"]
    tensors, _, _ = match_state(state, fp8_state("a"))
    assert tensors["known"].tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": VERSION + 1}, "Upgrade"),
        ({"version": "1"}, "not written by ds_fp8"),
        ({"names": ["a", "a"]}, "twice"),
        ({"names": [1, 2]}, "no list of layers"),
        ({"steps": -1}, "steps"),
        ({"scales": torch.ones(5)}, "scales does not fit"),
        ({"scales": torch.tensor([1.0, 2, 3, 4, 5, 0])}, "zero, negative or not finite"),
        ({"forward_history": torch.full((4, 4), -1.0)}, "negative values or NaN"),
        ({"backward_history": torch.zeros(4, 2, dtype=torch.float64)}, "does not fit"),
        ({"pending": torch.zeros(3)}, "pending does not fit"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_damaged_or_newer_is_refused_with_the_entry(change, said):
    with pytest.raises(CheckpointError, match=said):
        match_state(saved("a", "b") | change, fp8_state("a", "b"))


def test_a_truncated_state_names_what_is_missing():
    state = saved("a")
    del state["scales"], state["backward_folds"]
    with pytest.raises(CheckpointError, match="backward_folds, scales"):
        match_state(state, fp8_state("a"))
