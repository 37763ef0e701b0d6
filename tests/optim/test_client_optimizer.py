"""A client's Adam becomes ours, anything else is refused by name."""

from __future__ import annotations

import pytest
import torch

from ds_fp8.errors import PlanError
from ds_fp8.optim import ScaledAdam, ScaledAdamW, ScaledLion, algorithm_of, replace_client_optimizer
from tests.optim.given_gradients import parameters, train


@pytest.mark.parametrize(("client_cls", "ours_cls"), [(torch.optim.Adam, ScaledAdam), (torch.optim.AdamW, ScaledAdamW)])
def test_hyper_parameters_state_and_step_come_along(client_cls, ours_cls):
    """Three steps with the client, three with ours at O1: the bits of six with the client."""
    params, counterparts = parameters(), parameters()
    client, reference = (
        client_cls(p, lr=3e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2) for p in (params, counterparts)
    )
    train(client, params, 1, 3)
    ours = replace_client_optimizer(client, level="O1")
    assert type(ours) is ours_cls
    train(ours, params, 4, 6)
    train(reference, counterparts, 1, 6)
    assert all(torch.equal(a, b) for a, b in zip(params, counterparts, strict=True))


def test_a_scheduler_built_on_the_client_goes_on_working():
    """The groups stay the client's own dicts, keys of others in them too."""
    params = parameters()
    client = torch.optim.AdamW([{"params": params[:2], "name": "a"}, {"params": params[2:], "lr": 1e-2}], lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(client, 1, 0.5)
    ours = replace_client_optimizer(client, level="O2")
    client.step()
    schedule.step()
    assert [group["lr"] for group in ours.param_groups] == [5e-4, 5e-3]
    assert ours.param_groups[0]["name"] == "a"
    assert replace_client_optimizer(ours) is ours


def fused(package, name, **attributes):
    """An optimizer as DeepSpeed's, apex's and Transformer Engine's fused ones look from outside."""
    cls = type(name, (torch.optim.Optimizer,), {"__module__": f"{package}.ops"})
    client = cls(
        parameters(), {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": False}
    )
    for key, value in attributes.items():
        setattr(client, key, value)
    return client


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (lambda: fused("deepspeed", "FusedAdam", adam_w_mode=1), ScaledAdamW),
        (lambda: fused("deepspeed", "FusedAdam", adam_w_mode=0), ScaledAdam),
        (lambda: fused("deepspeed", "DeepSpeedCPUAdam", adam_w_mode=True), ScaledAdamW),
        (lambda: fused("apex", "FusedAdam", adam_w_mode=0), ScaledAdam),
        (lambda: fused("transformer_engine", "FusedAdam", adam_w_mode=1), ScaledAdamW),
    ],
)
def test_fused_adams_say_which_adam_they_are(client, expected):
    ours = replace_client_optimizer(client())
    assert type(ours) is expected
    assert ours.param_groups[0]["bias_correction"] is False
    assert ours.param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("name", ["FusedLion", "DeepSpeedCPULion"])
def test_lions_of_deepspeed_are_taken_with_their_state(name):
    """FusedLion counts the steps of a group in one parameter; exp_avg is all that either keeps."""
    client = fused("deepspeed", name)
    params = client.param_groups[0]["params"]
    for number, param in enumerate(params):
        client.state[param] = {"step": 5 if number == len(params) - 1 else 0, "exp_avg": torch.full_like(param, 0.25)}
    ours = replace_client_optimizer(client, level="O1")
    assert type(ours) is ScaledLion and algorithm_of(client) == "lion"
    assert ours.param_groups[0]["betas"] == (0.9, 0.99)
    taken = ours.export_fp32(params[0])
    assert taken["step"] == (5 if name == "FusedLion" else 0)
    assert torch.equal(taken["exp_avg"], torch.full_like(taken["exp_avg"], 0.25))


def test_scaled_moments_of_transformer_engine_are_read_unscaled():
    """Its FusedAdam keeps uint8 and fp16 moments beside a scale; the step stands in the group."""
    client = fused("transformer_engine", "FusedAdam", adam_w_mode=1)
    values = {}
    for group in client.param_groups:
        group["step"] = 4
        for param in group["params"]:
            values[param] = torch.full_like(param, 0.5)
            client.state[param] = {key: torch.ones_like(param, dtype=torch.uint8) for key in ("exp_avg", "exp_avg_sq")}
    client.get_unscaled_state = lambda param, key: values[param]
    ours = replace_client_optimizer(client, level="O1")
    for param, value in values.items():
        taken = ours.export_fp32(param)
        assert taken["step"] == 4
        assert torch.equal(taken["exp_avg"], value.reshape(-1))


def test_the_real_classes_of_deepspeed_have_these_attributes():
    """DeepSpeed 0.19.8: read in their sources, because building one compiles an extension."""
    import inspect

    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    assert "self.adam_w_mode" in inspect.getsource(FusedAdam.__init__)
    assert "self.adam_w_mode" in inspect.getsource(DeepSpeedCPUAdam.__init__)
    assert {FusedAdam.__name__, DeepSpeedCPUAdam.__name__} == {"FusedAdam", "DeepSpeedCPUAdam"}


class MyAdam(torch.optim.Adam):
    """A subclass may compute anything."""


@pytest.mark.parametrize(
    "client",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        torch.optim.NAdam,
        torch.optim.Adamax,
        MyAdam,
        lambda p: fused("somewhere", "FusedAdam", adam_w_mode=1),
    ],
)
def test_anything_else_is_refused_by_name(client):
    optimizer = client(parameters())
    with pytest.raises(PlanError, match=type(optimizer).__name__):
        replace_client_optimizer(optimizer)


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_options_that_ours_lacks_are_refused_by_name(option):
    with pytest.raises(PlanError, match=option):
        replace_client_optimizer(torch.optim.Adam(parameters(), **{option: True}))
    with pytest.raises(PlanError, match="amsgrad"):
        replace_client_optimizer(fused("deepspeed", "DeepSpeedCPUAdam", adam_w_mode=True, amsgrad=True))
