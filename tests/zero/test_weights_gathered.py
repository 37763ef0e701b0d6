"""O3 and user code: weights come back where DeepSpeed's own names ask for them, and what is written there stays."""

from __future__ import annotations

import gc

import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.dist


def make_engine(stage, level, **extra):
    import deepspeed
    from weights_jobs import Mixed

    import ds_fp8

    ds_fp8.activate()
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "steps_per_print": 10**9,
        "fp8": {"enabled": True, "backend": "torch"},
        "msamp": {"enabled": True, "opt_level": level},
        **extra,
    }
    return deepspeed.initialize(model=Mixed(), config=config)[0]


def take_steps(engine, steps):
    from weights_jobs import forward_loss

    losses = []
    for step in steps:
        loss = forward_loss(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def whole(engine):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def written(rank, world_size, stage):
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    from ds_fp8.zero.weights_released import is_released

    found = {}
    for level in ("O2", "O3"):
        engine = make_engine(stage, level)
        model = engine.module
        losses = take_steps(engine, range(2))
        before = whole(engine)
        released = is_released(model.up.weight) if stage < 3 else None
        pair = [model.up.weight, model.norm.weight]
        if level == "O2" and stage < 3:  # where DeepSpeed's context does nothing
            for param, place, value in zip(pair, ((3, 5), (2,)), (0.5, 2.0), strict=True):
                full = safe_get_full_fp32_param(param)
                full[place] = value
                safe_set_full_fp32_param(param, full)
        else:
            with deepspeed.zero.GatheredParameters(iter(pair), modifier_rank=1):
                if rank == 1:
                    with torch.no_grad():
                        model.up.weight[3, 5], model.norm.weight[2] = 0.5, 2.0
        after = whole(engine)
        losses += take_steps(engine, range(2, 4))
        # A setter of DeepSpeed's, on a weight that is released at this moment.
        full = safe_get_full_fp32_param(model.down.weight)
        full[1] *= 2
        safe_set_full_fp32_param(model.down.weight, full)
        losses += take_steps(engine, range(4, 6))
        found[level] = (losses, before, after, whole(engine), released)
        engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gathered_parameters_reads_and_writes_as_in_zero_3(stage):
    """Rank 1 writes two elements: both ranks, masters and quantized values follow, so O3 goes on as O2 does, bit for
    bit.
    """
    for found in run_ranks(2, written, stage):
        o2, o3 = found["O2"], found["O3"]
        assert o3[4] is (True if stage < 3 else None)
        assert o3[2]["up.weight"][3, 5] == 0.5
        assert o3[2]["norm.weight"][2] == 2.0
        assert o3[0] == o2[0]
        for at in (1, 2, 3):
            assert all(torch.equal(o3[at][name], weight) for name, weight in o2[at].items())


def contexts(rank, world_size):
    import deepspeed

    from ds_fp8.zero.weights_released import is_released

    baseline = deepspeed.zero.GatheredParameters.__init__
    engine = make_engine(2, "O3")
    model = engine.module
    take_steps(engine, range(1))
    found = {"wrapped": deepspeed.zero.GatheredParameters.__init__ is not baseline}
    with deepspeed.zero.GatheredParameters(model.up.weight):
        with deepspeed.zero.GatheredParameters(model.down.weight):
            pass
        found["inside"] = not is_released(model.up.weight)
        with torch.no_grad():
            model.up.weight.zero_()
            model.norm.weight.fill_(3.0)
    found["released"] = is_released(model.up.weight)
    found["rest"] = bool((model.norm.weight == 3.0).all())
    with deepspeed.zero.GatheredParameters(model.up.weight):
        found["dropped"] = bool((model.up.weight != 0).any())
    with deepspeed.zero.GatheredParameters(model.up.weight, enabled=False):
        found["disabled"] = is_released(model.up.weight)
    other = torch.nn.Parameter(torch.ones(3))
    with deepspeed.zero.GatheredParameters(other, modifier_rank=0):
        other.data.mul_(2)
    found["other"] = other.tolist()
    try:
        with deepspeed.zero.GatheredParameters([model.up.weight], modifier_rank=0):
            raise KeyError("of the user")
    except KeyError:
        found["after an error"] = is_released(model.up.weight)
    part = model.up.state_dict()
    found["state of a part"] = bool(part["weight"].isfinite().all())
    engine.destroy()
    del engine, model, part
    gc.collect()
    found["restored"] = deepspeed.zero.GatheredParameters.__init__ is baseline
    return found


def test_the_context_opens_and_closes():
    """Whole inside, released after, nested or not; a write without a modifier rank goes, as in ZeRO 3."""
    for found in run_ranks(2, contexts):
        assert found.pop("other") == [2.0, 2.0, 2.0]
        assert all(found.values()), found


def storage_of_the_flat(rank, world_size, stage):
    """(elements of the released 16-bit weights, whether anything still holds them) after a step at O3."""
    engine = make_engine(stage, "O3")
    take_steps(engine, range(2))
    numel = sum(param.numel() for param in engine.module.parameters())
    gc.collect()
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.dtype == torch.bfloat16]
    sizes = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() // 2 for one in tensors}
    return numel, max(sizes.values(), default=0)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_16_bit_weights_are_freed_on_two_ranks(stage):
    """DeepSpeed keeps views of its flat for every parameter; while one is left, all 2 bytes per parameter are."""
    for numel, largest in run_ranks(2, storage_of_the_flat, stage):
        assert largest < numel, f"a bf16 storage of {largest} elements is alive, the model has {numel}"


def set_alone(rank, world_size):
    import deepspeed.utils

    from ds_fp8.comm import meeting
    from ds_fp8.errors import WeightError

    meeting.Meeting.absent.__defaults__ = (3.0,)
    engine = make_engine(3, "O3")
    found = {"losses": take_steps(engine, range(2)), "error": ""}
    weight = engine.module.up.weight
    before = deepspeed.utils.safe_get_local_fp32_param(weight).clone()
    if rank == 0:
        try:
            deepspeed.utils.safe_set_local_fp32_param(weight, 2 * before)
        except WeightError as error:
            found["error"] = str(error)
    found["unchanged"] = torch.equal(deepspeed.utils.safe_get_local_fp32_param(weight), before)
    torch.distributed.barrier()
    found["losses"] += take_steps(engine, range(2, 4))
    deepspeed.utils.safe_set_local_fp32_param(weight, 2 * before)  # all of them, each its own part
    found["set"] = torch.equal(deepspeed.utils.safe_get_local_fp32_param(weight), 2 * before)
    found["losses"] += take_steps(engine, range(4, 5))
    engine.destroy()
    return found


def test_a_setter_that_one_rank_calls_alone_changes_no_gather():
    """In ZeRO 3: an error on that rank, and nothing is written; the run goes on."""
    first, second = run_ranks(2, set_alone, timeout_s=120)
    assert first["error"].startswith("a setter of DeepSpeed's: at O3") and "rank 1 did not ask" in first["error"]
    for found in (first, second):
        assert found["unchanged"] and found["set"]
        assert all(torch.isfinite(torch.tensor(found["losses"])))
