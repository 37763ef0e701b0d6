"""Which amax counts, and which scales a cast uses: recompute, accumulation, eval, shared and lonely modules.

Most models here have no engine, and update their histories before each pass; those with `managed` are held as an engine
holds them, and update when told to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_fp8.layers import ModelFp8State
from ds_fp8.recipe import Recipe
from tests.layers.small_models import Block, columns, swapped

RECIPE = Recipe(amax_history_len=4, amax_compute_algo="most_recent")


class Stack(nn.Module):
    """Three blocks; each may run under activation checkpointing."""

    def __init__(self, run: Callable | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.run is None else self.run(block, x)
        return x


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def non_reentrant(block, x):
    return checkpoint(block, x, use_reentrant=False)


def deepspeeds(block, x):
    checkpointing = pytest.importorskip("deepspeed").checkpointing
    return checkpointing.checkpoint(block, x)


def train(run: Callable | None, recipe: Recipe, steps: int = 3, **fp8) -> tuple:
    """Losses, gradients of the last step, the FP8 state."""
    torch.manual_seed(0)
    model = Stack(run)
    fp8_state = swapped(model, recipe, **fp8)
    losses = []
    for step in range(steps):
        model.zero_grad()
        for _ in range(2):
            x = (torch.randn(16, 32) * (1 + step)).requires_grad_()
            loss = model(x).pow(2).mean()
            loss.backward()
            losses.append(loss.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
        fp8_state.weights_changed()
    return torch.stack(losses), [parameter.grad for parameter in model.parameters()], fp8_state.state_dict()


@pytest.mark.parametrize("weight_cache", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("kind", ["delayed", "current", "block"])
@pytest.mark.parametrize("run", [reentrant, non_reentrant, deepspeeds], ids=lambda run: run.__name__)
def test_recompute_changes_nothing(run, kind, weight_cache):
    """Losses, gradients, scales and histories are those of the unmodified run, bit for bit: amax is recorded once."""
    recipe = Recipe(kind=kind, amax_history_len=4 if kind == "delayed" else 1024)
    baseline = train(None, recipe, weight_cache=weight_cache)
    again = train(run, recipe, weight_cache=weight_cache)
    assert torch.equal(baseline[0], again[0])
    assert all(torch.equal(*both) for both in zip(baseline[1], again[1], strict=True))
    for key in ("scales", "forward_history", "backward_history"):
        assert torch.equal(baseline[2][key], again[2][key]), key


@pytest.mark.parametrize("run", [reentrant, non_reentrant], ids=lambda run: run.__name__)
def test_forwards_in_flight_recompute_with_their_own_scales(run):
    """A pipeline runs forward 1, forward 2, backward 1, backward 2: each recompute meets the scales of its forward."""
    results = []
    for use in (None, run):
        torch.manual_seed(0)
        model = Stack(use)
        fp8_state = swapped(model, RECIPE, weight_cache=False)
        model(torch.randn(16, 32, requires_grad=True)).sum().backward()
        small, large = torch.randn(16, 32).requires_grad_(), (100 * torch.randn(16, 32)).requires_grad_()
        first, second = model(large), model(small)  # between them the input's scale falls by two powers of ten
        first.pow(2).mean().backward()
        second.pow(2).mean().backward()
        results.append((large.grad, small.grad, fp8_state.state_dict()["scales"]))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


def test_scales_are_constant_within_a_forward_and_move_with_the_next():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    fp8_state = swapped(model, RECIPE)
    model(torch.full((16, 32), 2.0)).sum().backward()
    assert fp8_state.scales[0] == 1, "not before the next forward begins"
    model(torch.full((16, 32), 4.0)).sum().backward()
    assert fp8_state.scales[0] == 448 / 2
    assert columns(fp8_state, "0")["forward_scale"][0] == 448 / 4


def test_under_an_engine_a_step_is_one_entry_whatever_was_run():
    """Four micro-batches share their scales; the step takes the largest amax. Without an engine each pass is an
    entry.
    """
    model = nn.Sequential(nn.Linear(32, 32))
    fp8_state = swapped(model, Recipe(amax_history_len=8, amax_compute_algo="most_recent"), managed=True)
    for micro in (1, 3, 0, 2):
        model(torch.full((16, 32), 1.0 + micro)).sum().backward()
        assert torch.equal(fp8_state.scales, torch.ones(3)), "scales stand still within a step"
    found = columns(fp8_state, "0")
    assert found["forward_history"][1:, 0].tolist() == [0, 0, 0, 0, 0, 0, 4]
    assert (found["forward_history"] > 0).sum() == 2 and (found["backward_history"] > 0).sum() == 1
    assert found["forward_scale"][0] == 448 / 4
    fp8_state.update_scales()  # a step in which this rank ran nothing: what it knows stays
    assert torch.equal(found["forward_history"], fp8_state.forward.history) and fp8_state.forward.updates == 2
    alone = nn.Sequential(nn.Linear(32, 32))
    fp8_state = swapped(alone, Recipe(amax_history_len=8))
    for micro in range(4):
        alone(torch.full((16, 32), 1.0 + micro)).sum().backward()
    assert columns(fp8_state, "0")["forward_history"][1:, 0].tolist() == [0, 0, 0, 1, 2, 3, 4]


def test_addresses_stay_and_an_old_forward_keeps_its_scales():
    """What a captured graph reads is rewritten in place; what a forward of the last step kept for its backward is
    not.
    """
    model = nn.Sequential(nn.Linear(32, 32))
    fp8_state = swapped(model, RECIPE, managed=True)
    addresses = [tensor.data_ptr() for tensor in (fp8_state.slots, fp8_state.pending, fp8_state.scales)]
    x = torch.full((16, 32), 2.0, requires_grad=True)
    model(x).sum().backward()
    fp8_state.update_scales()
    late = model(x)  # its backward comes two updates later
    wanted = torch.autograd.grad(late, x, torch.ones(16, 32), retain_graph=True)[0]
    kept = fp8_state.slots.clone()
    for _ in range(2):
        model(torch.full((16, 32), 7.0)).sum().backward()
        fp8_state.update_scales()
    assert not torch.equal(kept, fp8_state.slots) and fp8_state.slots[0, 1] == 448 / 7
    assert addresses == [tensor.data_ptr() for tensor in (fp8_state.slots, fp8_state.pending, fp8_state.scales)]
    assert torch.equal(torch.autograd.grad(late, x, torch.ones(16, 32))[0], wanted)


def test_weight_cache_casts_once_per_step(monkeypatch):
    """Where it is asked for; by default every forward casts."""
    from ds_fp8.layers.recipes import delayed

    casts = []
    for name in ("quantize", "quantize_with_amax"):
        baseline = getattr(delayed, name)
        monkeypatch.setattr(
            delayed, name, lambda x, *rest, baseline=baseline: casts.append(tuple(x.shape)) or baseline(x, *rest)
        )
    for cache, expected in ((True, 1), (False, 3)):
        model = nn.Sequential(nn.Linear(32, 48))
        fp8_state = swapped(model, RECIPE, weight_cache=cache, managed=True)
        fp8_state.optimized = frozenset(map(id, model.parameters()))
        fp8_state.weights_changed()
        casts.clear()
        for _ in range(3):
            model(torch.randn(16, 32)).sum().backward()
        assert casts.count((48, 32)) == expected


def test_eval_is_in_high_precision_unless_asked_for():
    """Eval in high precision is bit for bit nn.Linear's; neither way does it touch the scales."""
    x = torch.randn(16, 32)
    for in_fp8 in (False, True):
        torch.manual_seed(0)
        model = Stack()
        copied = copy.deepcopy(model)
        fp8_state = swapped(model, RECIPE, eval=in_fp8)
        model(x.clone().requires_grad_()).sum().backward()
        fp8_state.update_scales()
        before = fp8_state.state_dict()
        model.eval()
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with context():
                assert torch.equal(model(x), copied(x)) != in_fp8
        model.train()
        with torch.no_grad():
            model(x)  # training mode, but no gradients: nothing of it belongs into the histories
        after = fp8_state.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in ("scales", "forward_history", "backward_history"))
        model(x.clone().requires_grad_()).sum().backward()


def test_a_module_called_twice_records_the_larger_amax():
    """A shared layer has one state: MAX over its calls in the forward."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(32, 32)

        def forward(self, x):
            return self.shared(torch.full_like(x, 3.0)) + self.shared(torch.full_like(x, 7.0))

    model = Twice()
    fp8_state = swapped(model, RECIPE)
    model(torch.ones(16, 32)).sum().backward()
    found = columns(fp8_state, "shared")
    assert found["forward_history"][-1, 0] == 7
    assert found["backward_history"][-1] == 1
    assert fp8_state.forward.updates == fp8_state.backward.updates == 1


def test_a_submodule_called_by_itself_is_a_forward_scope_of_its_own():
    """No root forward, no engine: each pass over the submodule is one forward scope, whatever its number of layers."""
    torch.manual_seed(0)
    model = Stack()
    fp8_state = swapped(model, RECIPE)
    for _ in range(3):
        model.blocks[1](torch.randn(16, 32).requires_grad_()).sum().backward()
    fp8_state.update_scales()
    assert fp8_state.forward.updates == fp8_state.backward.updates == 3
    assert columns(fp8_state, "blocks.0.up")["forward_history"].sum() == 0
    assert (columns(fp8_state, "blocks.1.up")["forward_history"][1:, 0] > 0).all()


def test_a_failed_forward_closes_its_scope():
    model = Stack()
    fp8_state = swapped(model, RECIPE)
    with pytest.raises(RuntimeError):
        model(torch.randn(16, 31))
    assert fp8_state.scopes._depth == 0
    model(torch.randn(16, 32)).sum().backward()
    fp8_state.update_scales()
    assert fp8_state.forward.updates >= 1


def test_start_step_computes_in_high_precision_and_warms_the_scales():
    """Two steps equal the unmodified model's; then FP8 starts with scales that fit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    baseline = copy.deepcopy(model)
    fp8_state = swapped(model, Recipe(amax_history_len=4), start_step=2)
    for step in range(3):
        x = torch.randn(16, 32).requires_grad_()
        copied = x.detach().clone().requires_grad_()
        y, wanted = model(x), baseline(copied)
        y.sum().backward(), wanted.sum().backward()
        assert torch.equal(y, wanted) == torch.equal(x.grad, copied.grad) == (step < 2)
        if step == 2:
            assert fp8_state.scales[0] > 50 and float((y - wanted).detach().norm() / wanted.detach().norm()) < 2.0**-3
        fp8_state.weights_changed()


def test_interval_renews_the_scale_every_third_forward():
    model = nn.Sequential(nn.Linear(32, 32))
    fp8_state = swapped(model, Recipe(amax_history_len=4, amax_compute_algo="most_recent", interval=3))
    scales = []
    for number in range(7):
        model(torch.full((16, 32), 2.0**number)).sum().backward()
        scales.append(float(columns(fp8_state, "0")["forward_scale"][0]))
    assert scales == [448, 448, 448, 448 / 8, 448 / 8, 448 / 8, 448 / 64]


@pytest.mark.parametrize(
    "algorithm, wanted", [("max", [448, 56, 56, 56, 56, 112]), ("most_recent", [448, 56, 224, 112, 448, 448])]
)
def test_golden_values_of_delayed_scaling(algorithm, wanted):
    """History 4, amax 1, 8, 2, 4, 1, 1 (Transformer Engine)."""
    model = nn.Sequential(nn.Linear(32, 32))
    fp8_state = swapped(model, Recipe(amax_history_len=4, amax_compute_algo=algorithm))
    found = []
    for amax in (1, 8, 2, 4, 1, 1):
        model(torch.full((16, 32), float(amax)))
        found.append(float(columns(fp8_state, "0")["forward_scale"][0]))
    assert found == wanted


def test_margin_halves_the_scale():
    """448 / 2 fills the range; margin 1 keeps one bit of headroom: 112."""
    model = nn.Sequential(nn.Linear(32, 32))
    fp8_state = swapped(model, Recipe(amax_history_len=4, margin=1))
    model(torch.full((16, 32), 2.0))
    assert columns(fp8_state, "0")["forward_scale"][0] == 112


def test_a_copied_model_has_an_fp8_state_of_its_own():
    """deepcopy (an EMA model) and the original go separate ways."""
    model = Stack()
    fp8_state = swapped(model, RECIPE)
    model(torch.randn(16, 32)).sum().backward()
    copied = copy.deepcopy(model)
    copied_state = copied.blocks[0].up.layer_state.fp8_state
    assert isinstance(copied_state, ModelFp8State) and copied_state is not fp8_state
    copied(100 * torch.randn(16, 32)).sum().backward()
    copied_state.update_scales(), fp8_state.update_scales()
    assert copied_state.forward.updates == 2 and fp8_state.forward.updates == 1
    assert not torch.equal(copied_state.scales, fp8_state.scales)
