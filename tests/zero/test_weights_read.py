"""O3 and readers from outside: right values with a right gradient, or a stop with the name; never NaN, never a hang."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.dist

E4M3_ERROR = 2.0**-4
"""Half a step of three mantissa bits, relative to the value."""


def is_close(found, exact, scale_inv):
    """As near as e4m3 stands for bf16: half a step, of the smallest normal number where the value is smaller.

    Under delayed scaling weights that have grown since the scale was made are clamped: so does the layer.
    """
    exact = exact.clamp(-448 * scale_inv, 448 * scale_inv)
    return bool(((found - exact).abs() <= E4M3_ERROR * exact.abs() + 2.0**-10 * scale_inv).all())


def read(rank, world_size, stage, recipe):
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from reads_jobs import batch, reads, start, train, writes
    from torch.nn.utils import prune
    from torch.optim.swa_utils import AveragedModel

    from ds_fp8.errors import WeightError
    from ds_fp8.zero.weights_released import is_released

    engine = start("O3", stage, recipe=recipe)
    model, found = engine.module, {}
    train(engine, rank, range(2))
    weight = model.mid.weight
    assert is_released(weight)
    values, scale_inv = reads(weight), model.mid.quantized_weight.scale_inv.max().item()
    average = AveragedModel(model)
    average.update_parameters(model)
    state = weight.grad, weight.shape, weight.dtype, weight.is_contiguous(), weight.stride(), weight.requires_grad
    found["state"] = state == (None, (96, 96), torch.bfloat16, True, (96, 1), True)
    found["printed"] = repr(weight).startswith("Parameter containing:\ntensor(") and "nan" not in repr(weight)
    found["same dtype"] = model.to(torch.bfloat16) is model and model.cpu() is model
    found["address"] = weight.data_ptr() == weight.data_ptr() != model.enc.weight.data_ptr()
    held = torch.as_strided(weight.untyped_storage()._cdata and torch.tensor([], dtype=weight.dtype).set_(
        weight.untyped_storage()), (96, 96), (96, 1))  # fmt: skip
    values["storage"] = held.float()
    # Gradients through reads, beside those of the values themselves.
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    baseline = weight.detach().clone().requires_grad_()
    pairs = []
    for one in (weight, baseline):
        loss = torch.nn.functional.linear(x, one).float().pow(2).sum() + (one.float().norm() + one[3].sum())
        pairs.append(torch.autograd.grad(loss, one)[0])
    found["gradient"] = torch.equal(*pairs)
    found["func"] = torch.equal(
        torch.func.grad(lambda x: (x @ weight).float().sum())(x),
        torch.func.grad(lambda x: (x @ baseline).float().sum())(x),
    )
    # Another weight than the one that the quantized values stand for: given for one call, or pruned.
    zeros = {"weight": torch.zeros_like(baseline), "bias": model.mid.bias}
    found["functional_call"] = torch.equal(
        torch.func.functional_call(model.mid, zeros, (x,)), model.mid.bias.detach().expand(8, 96)
    )
    refused = {}
    for name, write in writes(model).items():
        try:
            write()
            refused[name] = "was not refused"
        except WeightError as error:
            refused[name] = str(error)
    # What one rank does alone, on copies.
    copied = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps({name: p.data for name, p in model.named_parameters()}))
    values["pickle"] = again["mid.weight"].detach().float()
    if rank == 0:
        values["copied state"] = copied.state_dict()["mid.weight"].float()
        with torch.no_grad():
            found["copy runs"] = bool(copied.eval()(batch(0, 0)).isfinite().all())
    values["average"] = average.module.mid.weight.detach().float()
    values["average state"] = average.state_dict()["module.mid.weight"].float()
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found["restored"] = not is_released(weight) and type(weight) is torch.nn.Parameter
    master = safe_get_full_fp32_param(weight)
    found["fp32"] = torch.allclose(master, whole["mid.weight"].float(), rtol=2**-7)
    train(engine, rank, range(2, 3))
    found["released again"] = is_released(weight)
    found["snapshot"] = torch.equal(whole["mid.weight"], whole["mid.weight"].clone())
    with deepspeed.zero.GatheredParameters([weight]):
        found["gathered"] = type(weight) is torch.nn.Parameter
    prune.random_unstructured(model.dec, "weight", amount=0.5)
    small = x * 0.1  # within the range of the layer's scale
    masked = torch.nn.functional.linear(small, model.dec.weight, model.dec.bias)
    found["pruned"] = bool((model.dec(small) - masked).float().norm() < 0.1 * masked.float().norm())
    exact = whole["mid.weight"].float()
    wrong = [n for n, v in values.items() if not is_close(v, exact[:4, :4] if n == "item" else exact, scale_inv)]
    engine.destroy()
    return found, wrong, refused


@pytest.mark.parametrize(("stage", "recipe"), [(1, "delayed"), (2, "block"), (2, "current")])
def test_every_read_is_right_and_every_write_is_refused_by_name(stage, recipe):
    for found, wrong, refused in run_ranks(2, read, stage, recipe):
        assert all(found.values()), found
        assert not wrong
        for name, message in refused.items():
            assert message.startswith("mid.weight was written to") and "GatheredParameters" in message, (name, message)
            assert 'msamp/weight_wire_exclude ["mid.weight"]' in message


def scripts(rank, world_size, stage, kinds):
    from reads_jobs import start, train

    rows = {}
    for kind in kinds:
        for level in (None, "O2", "O3"):
            engine = start(level, stage, kind)
            rows[kind, level] = train(engine, rank, range(6))
            engine.destroy()
    return rows


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_scripts_that_read_weights_train_as_the_control_does(stage):
    """A tied decoder, a functional call, a penalty: unmodified DeepSpeed's losses, to what FP8 products cost at O2 as
    well.
    """
    kinds = ("tied", "functional", "penalty") if stage < 3 else ("tied", "functional")
    rows = run_ranks(2, scripts, stage, kinds, timeout_s=200)[0]
    for kind in kinds:
        control, o2, o3 = rows[kind, None], rows[kind, "O2"], rows[kind, "O3"]
        assert control[-1] < 0.95 * control[0], "the control learns"
        assert o3 == pytest.approx(control, rel=0.03), (kind, o2)


def alone(rank, world_size, stage):
    import deepspeed
    from deepspeed import comm as dist
    from reads_jobs import batch, loss_of, start, train

    from ds_fp8.comm import meeting
    from ds_fp8.errors import WeightError
    from ds_fp8.zero.weights_released import is_released

    meeting.Meeting.absent.__defaults__ = (3.0,)
    found = {}
    engine = start("O3", stage)
    train(engine, rank, range(2))
    for step in range(2, 4):
        engine.eval()
        if rank == 0:
            before = time.monotonic()
            with torch.no_grad():
                found["evaluated"] = loss_of(engine, 9, 0).item()
            found["waited"] = time.monotonic() - before
            found["decoded"] = (copy.deepcopy(engine.module)(batch(9, 0)) - batch(9, 0)).float().pow(2).mean().item()
        dist.barrier()
        found["released"] = is_released(engine.module.mid.weight)
        engine.train()
        train(engine, rank, range(step, step + 1))
    engine.eval()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())), torch.no_grad():
        found["16 bits"] = loss_of(engine, 9, rank).item()
    engine.train()
    if rank == 0:
        before = time.monotonic()
        try:
            engine.module.state_dict()
            found["error"] = ""
        except WeightError as error:
            found["error"] = str(error)
        found["asked"] = time.monotonic() - before
    dist.barrier()
    train(engine, rank, range(5, 6))
    found["state"] = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    engine.destroy()
    return found


def test_one_rank_alone_never_hangs():
    """Rank 0 evaluates (with decoded weights, and waits for nobody) and saves (an error that says who is missing)."""
    first, second = run_ranks(2, alone, 2, timeout_s=120)
    assert first["evaluated"] == first["decoded"] and first["released"] and first["waited"] < 1
    assert first["16 bits"] != first["evaluated"]
    assert first["error"].startswith("state_dict(): at O3 the 16-bit values of enc.weight and ")
    assert "rank 1 did not ask" in first["error"] and "engine.save_16bit_model" in first["error"]
    assert 2 < first["asked"] < 15
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())


def kept(rank, world_size):
    from reads_jobs import start, train

    from ds_fp8.zero.weights_released import is_released

    found = []
    for patterns in ([], ["enc"]):
        engine = start("O3", 2, weight_wire_exclude=patterns)
        losses = train(engine, rank, range(4))
        released = [name for name, param in engine.module.named_parameters() if is_released(param)]
        written = None
        if patterns:
            with torch.no_grad():
                engine.module.enc.weight.clamp_(-0.01, 0.01)
            written = engine.module.enc.weight.abs().max().item()
        found.append((losses, released, written))
        engine.destroy()
    return found


def test_weight_wire_exclude_leaves_a_16_bit_parameter():
    """Losses are the same to the bit; the named weight is not released."""
    for everything, excluded in run_ranks(2, kept):
        assert everything[1] == ["enc.weight", "mid.weight", "dec.weight"]
        assert excluded[1] == ["mid.weight", "dec.weight"]
        assert excluded[0] == everything[0]
        assert excluded[2] == pytest.approx(0.01, rel=0.01)
