"""Checkpoints of the optimizer: exact resume, other levels, torch's Adam, and loads that fail as a whole."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from ds_fp8.errors import CheckpointError
from ds_fp8.levels import LEVELS
from ds_fp8.optim import ScaledAdamW
from tests.optim.given_gradients import parameters, train

STOCHASTIC = {"rounding": "stochastic"}
LEVEL_CASES = {
    "O1": LEVELS["O1"],
    "O2": LEVELS["O2"],
    "O3": LEVELS["O3"],
    "O2 stochastic": LEVELS["O2"].override(**STOCHASTIC),
    "fp16 master": LEVELS["O3"].override(master="fp16"),
    "e4m3": LEVELS["O2"].override(exp_avg="e4m3"),
    "expanded": LEVELS["O3"].override(exp_avg="e4m3_expanded", exp_avg_sq="e4m3_expanded", **STOCHASTIC),
    "bf16 states": LEVELS["O2"].override(exp_avg="bf16", exp_avg_sq="bf16", master="fp32", **STOCHASTIC),
}
BASES = [torch.bfloat16, torch.float16, torch.float32]


def through_file(thing):
    """What `torch.save` and a safe `torch.load` make of it."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def copies(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def snapshot(optimizer):
    """Everything that a failed load must not have touched."""
    return copy.deepcopy(
        ([dict(state) for state in optimizer.state.values()], optimizer.param_groups, list(optimizer.parameters()))
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.detach(), b.detach())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", LEVEL_CASES)
def test_resume_is_bit_exact(case, base):
    """Three steps, a file, five more: the bits of eight uninterrupted ones, stochastic rounding included."""
    params = parameters(base)
    ours = ScaledAdamW(params, level=LEVEL_CASES[case], seed=11)
    train(ours, params, 1, 3)
    saved, weights = through_file(ours.state_dict()), copies(params)
    train(ours, params, 4, 8)

    resumed = ScaledAdamW(weights, level=LEVEL_CASES[case])
    resumed.load_state_dict(saved)
    train(resumed, weights, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(params, weights, strict=True))
    assert same(ours.state_dict()["state"], resumed.state_dict()["state"])


@pytest.mark.parametrize("case", LEVEL_CASES)
def test_a_file_from_before_the_first_step_takes_the_moments_away(case):
    """Loaded after three steps: the next ones are those of a new optimizer on these weights."""
    params = parameters(torch.bfloat16)
    ours = ScaledAdamW(params, level=LEVEL_CASES[case], seed=11)
    saved = through_file(ours.state_dict())
    train(ours, params, 1, 3)
    ours.load_state_dict(saved)
    assert not saved["state"]
    for param in params:
        exported = ours.export_fp32(param)
        assert exported["step"] == 0
        assert not exported["exp_avg"].any()
        assert not exported["exp_avg_sq"].any()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", LEVEL_CASES)
def test_quantized_values_of_one_parameter_are_self_contained(case, base):
    """`export_quantized` holds the weight too: an empty optimizer over zeros becomes the old one."""
    params = parameters(base)
    ours = ScaledAdamW(params, level=LEVEL_CASES[case], seed=11)
    train(ours, params, 1, 3)
    quantized = through_file([ours.export_quantized(param) for param in params])
    train(ours, params, 4, 6)

    weights = [torch.nn.Parameter(torch.zeros_like(param)) for param in params]
    resumed = ScaledAdamW(weights, level=LEVEL_CASES[case], seed=11)
    for weight, one in zip(weights, quantized, strict=True):
        resumed.import_quantized(weight, one)
    train(resumed, weights, 4, 6)
    assert all(torch.equal(a, b) for a, b in zip(params, weights, strict=True))


def test_stochastic_rounding_depends_on_seed_and_partition():
    """Another seed, other quantized values; equal partitions of one optimizer round differently too."""
    results = []
    for seed in (1, 2):
        params = [torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in range(2)]
        ours = ScaledAdamW(params, level=LEVELS["O2"].override(**STOCHASTIC), seed=seed)
        # Two steps: after one, m / sqrt(v) is the same for all elements.
        for grad in (torch.linspace(1, 2, 512), torch.linspace(3, 1, 512)):
            for param in params:
                param.grad = grad.bfloat16()
            ours.step()
        results += [ours.state[param]["exp_avg.data"] for param in params]
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[i + 1 :])


@pytest.mark.parametrize("source", ["O1", "expanded", "fp16 master"])
@pytest.mark.parametrize("target", ["O1", "O2", "bf16 states"])
def test_another_level_takes_what_it_can_hold(source, target):
    """Quantized values are decoded and encoded anew: the master agrees to the coarser one's precision, the moments
    too.
    """
    params = parameters(torch.bfloat16)
    ours = ScaledAdamW(params, level=LEVEL_CASES[source])
    train(ours, params, 1, 3)
    weights = copies(params)
    other = ScaledAdamW(weights, level=LEVEL_CASES[target])
    other.load_state_dict(through_file(ours.state_dict()))
    for param, weight in zip(params, weights, strict=True):
        a, b = ours.export_fp32(param), other.export_fp32(weight)
        assert a["step"] == b["step"] == 3
        assert torch.allclose(a["master"], b["master"], rtol=2.0**-11)
        for moment in ("exp_avg", "exp_avg_sq"):
            error = (a[moment] - b[moment]).norm() / a[moment].norm().clamp(min=1e-30)
            assert error < 0.04


def test_torchs_adam_is_replaced_and_given_back():
    """torch's state_dict into O1, and the fp32 export back into torch: the very bits it would have had."""
    counterparts = parameters()
    baseline = torch.optim.AdamW(counterparts, lr=1e-3, weight_decay=0.01)
    train(baseline, counterparts, 1, 3)
    params = copies(counterparts)
    ours = ScaledAdamW(params, level="O1")
    ours.load_state_dict(through_file(baseline.state_dict()))
    train(ours, params, 4, 6)
    train(baseline, counterparts, 4, 6)
    assert all(torch.equal(a, b) for a, b in zip(params, counterparts, strict=True))
    for param, counterpart in zip(params, counterparts, strict=True):
        assert torch.equal(ours.export_fp32(param)["exp_avg_sq"], baseline.state[counterpart]["exp_avg_sq"].flatten())
    assert "amsgrad" not in ours.param_groups[0]


def test_ranges_of_an_export_are_ranges_of_the_whole():
    """Fragments ask for slices that start and end inside blocks."""
    param = torch.nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16())
    ours = ScaledAdamW([param], level="O2")
    param.grad = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours.step()
    whole = ours.export_fp32(param)
    for start, stop in ((0, 1), (127, 129), (200, 1000), (5, 5)):
        part = ours.export_fp32(param, start=start, stop=stop)
        for name in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(part[name], whole[name][start:stop])
    assert set(ours.export_fp32(param, only=("exp_avg",))) == {"step", "exp_avg"}


@pytest.mark.parametrize("exp_avg_sq", ["fp32", "bf16", "fp16", "e4m3", "e4m3_expanded"])
@pytest.mark.parametrize("exp_avg", ["int8", "e4m3", "e4m3_expanded"])
def test_a_moment_set_alone_leaves_the_other(exp_avg, exp_avg_sq):
    """A new exp_avg_sq has other roots, so the ratio is encoded anew and exp_avg keeps its value, to one more rounding.

    Rounding e4m3 costs 2^-4 at most and .026 rms; expanded less on normal blocks.
    """
    level = LEVELS["O2"].override(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    param = torch.nn.Parameter(torch.zeros(1000))
    ours = ScaledAdamW([param], level=level)
    param.grad = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 1e-3
    ours.step()
    before = ours.export_fp32(param)
    ours.import_fp32(param, exp_avg_sq=torch.rand(1000, generator=torch.Generator().manual_seed(2)) + 0.5)
    after = ours.export_fp32(param)
    assert (after["exp_avg"] - before["exp_avg"]).norm() < 0.04 * before["exp_avg"].norm()
    quantized = {key: value.clone() for key, value in ours.state[param].items() if key.startswith("exp_avg_sq")}
    ours.import_fp32(param, exp_avg=2 * before["exp_avg"])
    assert all(torch.equal(ours.state[param][key], value) for key, value in quantized.items())
    assert (ours.export_fp32(param)["exp_avg"] / 2 - before["exp_avg"]).norm() < 0.04 * before["exp_avg"].norm()


def test_an_exported_state_comes_back_to_its_quantized_values():
    """decode, encode: r * r has r for its root, m = x * r has x for its ratio up to a last bit that no code sees."""
    param = torch.nn.Parameter(torch.zeros(1000))
    ours = ScaledAdamW([param], level="O2")
    for seed in range(3):
        param.grad = torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * 1e-3
        ours.step()
    quantized = {key: value.clone() for key, value in ours.state[param].items() if key.endswith(".data")}
    ours.import_fp32(param, **ours.export_fp32(param))
    assert all(torch.equal(ours.state[param][key], value) for key, value in quantized.items())


@pytest.mark.parametrize(("before", "after"), [("int8", "e4m3"), ("e4m3", "int8"), ("int8", "fp32"), ("bf16", "int8")])
def test_another_exp_avg(before, after):
    """A state that was saved in one format goes on in the other: decoded, encoded anew, wrong by e4m3's half ulp,
    2^-4, at most.
    """
    params = parameters(torch.bfloat16)
    ours = ScaledAdamW(params, level=LEVELS["O2"].override(exp_avg=before))
    train(ours, params, 1, 3)
    weights = copies(params)
    theirs = ScaledAdamW(weights, level=LEVELS["O2"].override(exp_avg=after))
    theirs.load_state_dict(through_file(ours.state_dict()))
    for param, weight in zip(params, weights, strict=True):
        wanted, found = ours.export_fp32(param), theirs.export_fp32(weight)
        assert (found["exp_avg"] - wanted["exp_avg"]).norm() <= 2.0**-4 * wanted["exp_avg"].norm()
        assert torch.equal(found["exp_avg_sq"], wanted["exp_avg_sq"])
        assert torch.equal(found["master"], wanted["master"])


def test_int8_for_exp_avg_sq_is_refused():
    """It would be read as something that no step writes."""
    params = parameters()
    ours = ScaledAdamW(params, level="O2")
    train(ours, params, 1, 1)
    saved = through_file(ours.state_dict())
    saved["ds_fp8"]["formats"]["exp_avg_sq"] = "int8"
    with pytest.raises(CheckpointError, match="exp_avg_sq format 'int8' is not one of fp32, bf16, fp16, e4m3"):
        ours.load_state_dict(saved)


@pytest.mark.parametrize("other", ["fp32", "bf16", "e4m3"])
def test_another_exp_avg_sq_beside_the_same_8_bit_exp_avg(other):
    """The format of exp_avg is the same, its quantized values are not: their divisor has changed."""
    params = parameters(torch.bfloat16)
    ours = ScaledAdamW(params, level="O2")
    train(ours, params, 1, 3)
    weights = copies(params)
    theirs = ScaledAdamW(weights, level=LEVELS["O2"].override(exp_avg_sq=other))
    theirs.load_state_dict(through_file(ours.state_dict()))
    for param, weight in zip(params, weights, strict=True):
        wanted, found = ours.export_fp32(param)["exp_avg"], theirs.export_fp32(weight)["exp_avg"]
        assert (found - wanted).norm() <= 0.04 * wanted.norm()


def test_groups_are_loaded_in_place():
    """Schedulers and ZeRO hold on to the very dicts."""
    params = parameters()
    ours = ScaledAdamW(params, lr=1e-3)
    group = ours.param_groups[0]
    saved = ScaledAdamW(parameters(), lr=7e-4).state_dict()
    ours.load_state_dict(saved)
    assert ours.param_groups[0] is group
    assert group["lr"] == 7e-4


def damaged(saved, kind):
    """One thing wrong with a checkpoint."""
    state = saved["state"]
    if kind == "shape":
        state[1]["exp_avg.data"] = state[1]["exp_avg.data"][:-1]
    elif kind == "dtype":
        state[1]["exp_avg.data"] = state[1]["exp_avg.data"].float()
    elif kind == "missing":
        del state[3]["exp_avg_sq.scale_inv"]
    elif kind == "extra":
        state[0]["momentum_buffer"] = torch.zeros(3)
    elif kind == "step":
        del state[3]["step"]
    elif kind == "version":
        saved["ds_fp8"]["version"] = 99
    elif kind == "before the ratio":
        saved["ds_fp8"]["version"] = 1
    elif kind == "format":
        saved["ds_fp8"]["formats"]["exp_avg"] = "int4"
    elif kind == "header":
        saved["ds_fp8"] = {"version": 1}
    elif kind == "groups":
        saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][:-1]
    elif kind == "base":
        saved["ds_fp8"]["dtypes"] = ["fp16"] * 5
    elif kind == "foreign":
        del saved["ds_fp8"]
    elif kind == "nothing":
        saved.clear()
    return saved


@pytest.mark.parametrize(
    "kind",
    [
        "shape",
        "dtype",
        "missing",
        "extra",
        "step",
        "version",
        "before the ratio",
        "format",
        "header",
        "groups",
        "base",
        "foreign",
        "nothing",
    ],
)
def test_a_damaged_checkpoint_changes_nothing(kind):
    """Looked at whole before the first entry is touched."""
    params = parameters(torch.bfloat16)
    ours = ScaledAdamW(params, level="O2")
    train(ours, params, 1, 2)
    saved = damaged(copy.deepcopy(ours.state_dict()), kind)
    train(ours, params, 3, 3)
    before = snapshot(ours)
    with pytest.raises(CheckpointError):
        ours.load_state_dict(saved)
    assert same(snapshot(ours), before)


def test_damaged_quantized_values_and_flats_change_nothing():
    params = parameters(torch.bfloat16)
    ours = ScaledAdamW(params, level="O2")
    train(ours, params, 1, 2)
    before = snapshot(ours)
    quantized = ours.export_quantized(params[0])
    changes = ({"version": 99}, {"version": 1}, {"dtype": "fp64"}, {"weight": torch.zeros(3)})
    for broken in ({}, *({**quantized, **change} for change in changes)):
        with pytest.raises(CheckpointError):
            ours.import_quantized(params[0], broken)
    with pytest.raises(CheckpointError, match="5 elements"):
        ours.import_fp32(params[0], master=torch.zeros(params[0].numel()), exp_avg=torch.zeros(5))
    assert same(snapshot(ours), before)
