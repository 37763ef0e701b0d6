"""An Adam that has trained before `deepspeed.initialize` goes on where it was: moments and step, in every stage.

Five steps in torch, then the hand-over, then four in the engine, beside a counterpart that stays in torch. DeepSpeed
alone drops the state under ZeRO; an Adam that starts anew takes a first step of lr in the direction of the sign of each
gradient.
"""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import safe_get_full_optimizer_state
from ranks import run_ranks
from states_jobs import OddNet, batch, ds_config, full_weights, make_engine, make_plan, train

from ds_fp8.errors import PlanError

pytestmark = pytest.mark.dist

STEPS_BEFORE, STEPS_AFTER = 5, 4
MOMENTS = ("exp_avg", "exp_avg_sq")
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}

CASES = {
    **{f"stage{stage}-O1-fp32": {"stage": stage, "level": "O1", "dtype": "fp32"} for stage in (0, 1, 2, 3)},
    **{f"stage{stage}-{level}": {"stage": stage, "level": level} for stage in (0, 1, 2, 3) for level in ("O1", "O2")},
    "stage1-fp32-sums": {"stage": 1, "level": "O1", "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "stage2-offload": {"stage": 2, "level": "O1", "config": OFFLOAD},
    "stage2-round-robin": {"stage": 2, "level": "O1", "config": {"zero": {"round_robin_gradients": True}}},
    "stage3-sub-groups": {"stage": 3, "level": "O1", "config": {"zero": {"sub_group_size": 500}}},
}


def trained(parameters) -> torch.optim.Optimizer:
    """AdamW after some steps on drawn gradients, the same on every rank and in the counterpart."""
    parameters = list(parameters)
    wide, rest = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS_BEFORE):
        for param in parameters:
            param.grad = torch.randn(param.shape, generator=generator) * 0.1
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def in_torch(world_size: int) -> torch.Tensor:
    """The weights of the counterpart, in fp32 to the end."""
    torch.manual_seed(0)
    model = OddNet()
    optimizer = trained(model.parameters())
    for step in range(STEPS_AFTER):
        for rank in range(world_size):
            x, y = batch(step, 0, rank, torch.float32)
            ((model(x) - y).pow(2).mean() / world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


def states_of(engine) -> dict[str, torch.Tensor]:
    """Moments of the whole model as the engine has them."""
    params = list(engine.module.parameters())
    if engine.zero_optimization_stage():
        return {key: torch.cat([safe_get_full_optimizer_state(p, key).reshape(-1) for p in params]) for key in MOMENTS}
    exported = [engine.optimizer.optimizer.export_fp32(param) for param in params]
    return {key: torch.cat([each[key] for each in exported]) for key in MOMENTS}


def steps_of(engine) -> set[int]:
    return {state["step"] for state in engine.optimizer.optimizer.state.values()}


def work(rank: int, world_size: int) -> dict:
    results = {"torch": in_torch(world_size)}
    for name, case in CASES.items():
        given: dict = {}

        def build(parameters, given=given):
            parameters = list(parameters)
            client = trained(parameters)
            given |= {key: torch.cat([client.state[p][key].reshape(-1) for p in parameters]) for key in MOMENTS}
            return client

        config = ds_config(case["stage"], case.get("dtype", "bf16"), clip=0.0, **case.get("config", {}))
        plan = make_plan(case["level"], dtype=case.get("dtype", "bf16"), stage=case["stage"])
        engine = make_engine(config, plan, optimizer=build)
        taken, steps = states_of(engine), steps_of(engine)
        before = full_weights(engine)
        train(engine, range(STEPS_AFTER))
        results[name] = {
            "given": given,
            "taken": taken,
            "steps": steps,
            "orphans": [key for key in engine.optimizer.optimizer.state if id(key) not in flats_of(engine)],
            "before": before,
            "weights": full_weights(engine),
        }
        engine.destroy()
    return results


def flats_of(engine) -> set[int]:
    return {id(master) for master in engine.optimizer.fp8_masters}


@pytest.fixture(scope="module")
def results():
    return run_ranks(2, work)


@pytest.mark.parametrize("name", CASES)
def test_moments_and_step_arrive(results, name):
    """fp32 states to the bit; quantized values within their half ulp. Nothing is kept for tensors that ours does not
    step.
    """
    for of_rank in results:
        got = of_rank[name]
        assert got["steps"] == {STEPS_BEFORE}
        assert got["orphans"] == []
        for key in MOMENTS:
            if CASES[name]["level"] == "O1":
                assert torch.equal(got["taken"][key], got["given"][key]), key
            else:
                error = (got["taken"][key] - got["given"][key]).norm() / got["given"][key].norm()
                assert error < 2**-4, key


@pytest.mark.parametrize("name", CASES)
def test_the_way_of_torch_goes_on(results, name):
    """An fp32 job: torch's own weights. 16-bit weights: four steps of 1e-3 and a rounding at the start and the end."""
    expected = results[0]["torch"]
    for of_rank in results:
        weights = of_rank[name]["weights"]
        if CASES[name].get("dtype") == "fp32":
            assert torch.allclose(weights, expected, rtol=0, atol=2e-6)
        else:
            excess = (weights - expected).abs() - 2 * 2**-8 * expected.abs()
            assert excess.max() < 3e-4


def refusals(rank: int, world_size: int) -> dict[str, str]:
    def uneven(parameters):
        parameters = list(parameters)
        client = trained(parameters)
        client.state[parameters[0]]["step"] += 1
        return client

    def on_one_rank(parameters):
        client = trained(parameters)
        if rank == 1:
            client.state.clear()
        return client

    def cut(parameters):
        client = trained(parameters)
        for state in client.state.values():
            state["exp_avg"] = state["exp_avg"].reshape(-1)[:3]
        return client

    results = {}
    for stage in (0, 1, 3):
        for build in (uneven, on_one_rank, cut):
            try:
                make_engine(ds_config(stage), make_plan("O2", stage=stage), optimizer=build).destroy()
                results[stage, build.__name__] = ""
            except PlanError as error:
                results[stage, build.__name__] = str(error)
    return results


def test_what_cannot_be_cut_is_refused_on_all_ranks():
    """In stage 0 every parameter has a step of its own, so uneven ones are no obstacle there."""
    for of_rank in run_ranks(2, refusals):
        for (stage, name), message in of_rank.items():
            words = {"uneven": "5 to 6 steps", "on_one_rank": "not the same on all ranks", "cut": "3 elements"}[name]
            assert (message == "") if (stage, name) == (0, "uneven") else (words in message), (stage, name, message)


def as_deepspeeds(cls, parameters):
    """DeepSpeed's own class with the state its step leaves, without the extension that its constructor compiles."""
    reference = trained(parameters)
    client = cls.__new__(cls)
    torch.optim.Optimizer.__init__(client, reference.param_groups, dict(reference.defaults, bias_correction=True))
    client.adam_w_mode = True
    client.opt_id, client.ds_opt_adam = 0, SimpleNamespace(destroy_adam=lambda number: None)
    for group in client.param_groups:
        for param in group["params"]:
            state = {**reference.state[param], "step": STEPS_BEFORE}
            if cls is FusedAdam and param is not group["params"][-1]:
                state["step"] = 0
            client.state[param] = state
    return client


def deepspeeds_own(rank: int, world_size: int) -> dict[str, dict]:
    results = {}
    for stage in (0, 2, 3):
        for cls in (FusedAdam, DeepSpeedCPUAdam, torch.optim.AdamW):

            def build(parameters, cls=cls):
                parameters = list(parameters)
                return trained(parameters) if cls is torch.optim.AdamW else as_deepspeeds(cls, parameters)

            engine = make_engine(ds_config(stage), make_plan("O1", stage=stage), optimizer=build)
            taken, steps = states_of(engine), steps_of(engine)
            train(engine, range(2))
            results[f"{stage} {cls.__name__}"] = {"steps": steps, **taken, "weights": full_weights(engine)}
            engine.destroy()
    return results


def test_deepspeeds_own_adams():
    """FusedAdam of 0.19.8 counts steps in the last parameter of a group only; what counts is the group's step."""
    got = run_ranks(2, deepspeeds_own)[0]
    for stage in (0, 2, 3):
        expected = got[f"{stage} AdamW"]
        for name in ("FusedAdam", "DeepSpeedCPUAdam"):
            found = got[f"{stage} {name}"]
            assert found["steps"] == {STEPS_BEFORE}
            for key in (*MOMENTS, "weights"):
                assert torch.equal(found[key], expected[key]), (stage, name, key)


def under_zero_init(rank: int, world_size: int) -> dict:
    """A state_dict of whole parameters, loaded into an optimizer over parameters that zero.Init has partitioned."""
    from states_jobs import states_for

    torch.manual_seed(0)
    saved = trained(OddNet().parameters()).state_dict()
    config = ds_config(3, clip=0.0)
    config.pop("optimizer")
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = OddNet()
    parameters = list(model.parameters())
    groups = [[p for p in parameters if p.ds_shape.numel() > 61], [p for p in parameters if p.ds_shape.numel() <= 61]]
    client = torch.optim.AdamW([{"params": group} for group in groups])
    client.load_state_dict(saved)
    for state in client.state.values():
        for key in MOMENTS:
            state[key] = state[key].float()
    expected = torch.cat([client.state[p]["exp_avg"].reshape(-1) for p in parameters])
    with states_for(make_plan("O1", stage=3)):
        engine = deepspeed.initialize(model=model, config=config, optimizer=client)[0]
    result = {"steps": steps_of(engine), "same": torch.equal(states_of(engine)["exp_avg"], expected)}
    engine.destroy()
    return result


def test_whole_states_over_partitioned_parameters():
    for of_rank in run_ranks(2, under_zero_init):
        assert of_rank == {"steps": {STEPS_BEFORE}, "same": True}
