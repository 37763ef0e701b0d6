"""`AmaxHistory` by hand: three columns, a history of four, one update for each step."""

from __future__ import annotations

import pytest
import torch

from ds_fp8.formats import E4M3
from ds_fp8.layers.amax_history import AmaxHistory, counts
from ds_fp8.recipe import Recipe

INF, NAN = float("inf"), float("nan")


def history(**changes) -> AmaxHistory:
    return AmaxHistory(Recipe(amax_history_len=4, **changes), E4M3, torch.ones(3))


def after(*steps: list[float], **changes) -> AmaxHistory:
    made = history(**changes)
    for amax in steps:
        made.update(torch.tensor(amax))
    return made


def test_the_scale_of_the_next_step_fills_the_range_of_the_format():
    """448 / 2 = 224, 448 / 448 = 1, 448 / 7 = 64."""
    assert after([2.0, 448.0, 7.0]).scale.tolist() == [224.0, 1.0, 64.0]


def test_the_newest_amax_is_the_last_row_and_slot_0_is_open():
    """After steps 1, 2 and 4 a history of four holds 0 (open), 1, 2, 4; a fifth step drops the oldest."""
    assert after([1.0] * 3, [2.0] * 3, [4.0] * 3).history[:, 0].tolist() == [0.0, 1.0, 2.0, 4.0]
    steps = [[float(2**number)] * 3 for number in range(5)]
    assert after(*steps).history[:, 0].tolist() == [0.0, 4.0, 8.0, 16.0]


def test_max_looks_at_the_whole_history_and_most_recent_at_the_last_step():
    """Steps of 7 and 2: 448 / 7 = 64 by the largest, 448 / 2 = 224 by the last."""
    steps = [7.0] * 3, [2.0] * 3
    assert after(*steps, amax_compute_algo="max").scale[0] == 64
    assert after(*steps, amax_compute_algo="most_recent").scale[0] == 224


def test_a_margin_of_two_leaves_two_bits_free():
    assert after([2.0] * 3, margin=2).scale[0] == 224 / 4


@pytest.mark.parametrize("amax", [0.0, INF, NAN])
def test_a_column_without_a_usable_amax_is_left_alone(amax):
    """Neither its scale nor its history moves; the column beside it goes on."""
    found = after([2.0, 2.0, 2.0], [amax, 7.0, amax])
    assert found.scale.tolist() == [224.0, 64.0, 224.0]
    assert found.history[:, 0].tolist() == [0.0, 0.0, 0.0, 2.0]
    assert found.history[:, 1].tolist() == [0.0, 0.0, 2.0, 7.0]
    assert counts(torch.tensor([amax, 7.0])).tolist() == [False, True]


def test_by_transformer_engines_rules_an_infinity_stays_in_the_history_and_holds_the_scale():
    made = AmaxHistory(Recipe(amax_history_len=4), E4M3, torch.ones(3), keeps_non_finite=True)
    made.update(torch.tensor([2.0, 2.0, 2.0]))
    made.update(torch.tensor([INF, 2.0, 2.0]))
    made.update(torch.tensor([1.0, 2.0, 2.0]))
    assert made.history[:, 0].tolist() == [0.0, 2.0, INF, 1.0]
    assert made.scale[0] == 224


def test_an_interval_of_two_renews_the_scales_at_the_first_update_and_every_second():
    made = history(interval=2, amax_compute_algo="most_recent")
    seen = []
    for amax in (2.0, 7.0, 448.0):
        made.update(torch.full((3,), amax))
        seen.append(made.scale[0].item())
    assert seen == [224.0, 224.0, 1.0]


def test_scales_are_written_in_place():
    """Graphs and snapshots hold on to the address."""
    scale = torch.ones(3)
    AmaxHistory(Recipe(amax_history_len=4), E4M3, scale).update(torch.tensor([2.0, 2.0, 2.0]))
    assert scale.tolist() == [224.0] * 3


def test_a_buffer_that_a_kernel_filled_becomes_the_history():
    made = after([2.0] * 3)
    made.spare.fill_(5.0)
    made.take_spare()
    assert made.history.eq(5.0).all() and made.updates == 2
