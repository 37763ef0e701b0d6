"""Which modules are swapped, and that every one that is not has its reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ds_fp8.capabilities import Host
from ds_fp8.config.settings import LayerSettings
from ds_fp8.errors import PlanError
from ds_fp8.plan import Plan, make_plan
from ds_fp8.recipe import Recipe
from tests.layers.small_models import TinyModel, settings

CPU = Host()


class Special(nn.Linear):
    """A subclass, whose forward is its own business."""


class Zoo(nn.Module):
    """One module for each reason."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.odd = nn.Linear(32, 17)
        self.fine = nn.Linear(32, 48)
        self.special = Special(32, 32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.normed = parametrizations.weight_norm(nn.Linear(32, 32))
        self.double = nn.Linear(32, 32).double()
        self.patched = nn.Linear(32, 32)
        self.patched.forward = lambda x: x
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.tied = nn.Linear(32, 64, bias=False)
        self.tied.weight = self.embed.weight
        self.tied_a, self.tied_b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.tied_b.weight = self.tied_a.weight
        self.norm = nn.LayerNorm(32)
        self.bare = nn.LayerNorm(32, elementwise_affine=False)
        self.biasless = nn.LayerNorm(32, bias=False)
        self.plane = nn.LayerNorm((4, 32))
        self.rms = nn.RMSNorm(32)


def plan_of(model: nn.Module, recipe: str = "delayed", **layers) -> Plan:
    return make_plan(model, settings(Recipe(kind=recipe), layers=LayerSettings(**layers)), host=CPU)


def reasons(plan: Plan) -> dict[str, str]:
    return {decision.fqn: decision.reason for decision in plan.modules if not decision.is_swap}


def swaps(plan: Plan) -> list[str]:
    return [decision.fqn for decision in plan.swaps]


def test_every_module_has_a_decision_and_every_kept_one_a_reason():
    """One unaligned layer says nothing about its siblings; frozen layers and two linears with one weight are fine."""
    plan = plan_of(Zoo())
    assert swaps(plan) == ["fine", "frozen", "tied_a", "tied_b", "norm", "rms"]
    assert reasons(plan) == {
        "odd": "not a multiple of 16: 17",
        "special": "subclass Special",
        "attention.out_proj": "nn.MultiheadAttention never calls its out_proj",
        "normed": "its weight is parametrized",
        "double": "its weight is float64",
        "patched": "its forward was replaced on the instance",
        "tied": "tied to embed (Embedding)",
        "bare": "no affine weight",
        "biasless": "no bias",
        "plane": "normalizes over several dimensions",
    }


def test_fp64_weights_are_judged_as_what_deepspeed_casts_them_to():
    """Under `torch.set_default_dtype(torch.float64)`: a job in bf16 casts them, one in fp32 leaves them."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).double()
    assert swaps(make_plan(model, settings(level="O2"), host=CPU)) == ["0", "1"]
    with pytest.raises(PlanError, match="its weight is float64"):
        make_plan(model, settings(), host=CPU)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_submodules_of_torchscript_are_left_alone():
    model = nn.Sequential(nn.Linear(32, 32), torch.jit.script(nn.Linear(32, 32)))
    model.append(torch.jit.trace(nn.Sequential(nn.Linear(32, 32), nn.GELU()), torch.randn(2, 32)))
    plan = make_plan(model, settings(level="O2"), host=CPU)
    assert swaps(plan) == ["0"]
    assert len(plan.parameters) == 6


def test_include_and_exclude():
    model = TinyModel(blocks=3)
    assert swaps(plan_of(model, include=("blocks.1.*",))) == ["blocks.1.norm", "blocks.1.up", "blocks.1.down"]
    plan = plan_of(model, exclude=("*.down", "*.norm"))
    assert swaps(plan) == ["blocks.0.up", "blocks.1.up", "blocks.2.up"]
    assert reasons(plan)["blocks.2.down"] == "excluded by '*.down'"
    assert reasons(plan_of(model, include=("blocks.1.*",)))["blocks.0.up"] == "not in include"
    assert reasons(plan_of(model, norm=False))["blocks.0.norm"] == "fp8/layers/norm is false"
    assert swaps(plan_of(model, linear=False)) == ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm"]


def test_naming_a_module_overrules_a_default_but_not_a_hard_check():
    plan = plan_of(Zoo(), include=("special", "tied", "fine"))
    assert swaps(plan) == ["fine", "special", "tied"]
    assert plan.decision("tied").reason == "tied to embed (Embedding), but included by name"
    assert "special" in swaps(plan_of(Zoo(), include=("Special", "fine"))), "by the name of its class"
    assert "special" not in swaps(plan_of(Zoo(), include=("*",))), "a glob does not name a subclass"
    for pattern in ("odd", "normed", "double", "bare"):
        with pytest.raises(PlanError, match=f"asks for {pattern}, which cannot"):
            plan_of(Zoo(), include=(pattern, "fine"))


def test_an_unaligned_layer_that_a_glob_names_is_an_error_with_the_cure():
    with pytest.raises(
        PlanError, match=r"'o\*' asks for odd.*not a multiple of 16: 17\.\n  Add 'odd' to fp8/layers/exclude, or pad"
    ):
        plan_of(Zoo(), include=("o*", "fine"))
    assert "odd" in reasons(plan_of(Zoo(), include=("*",)))


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error_with_the_closest_names(key):
    with pytest.raises(
        PlanError, match=rf"fp8/layers/{key}: 'block\.0\.up' matches no .*\n  Closest names: blocks\.0\.up"
    ):
        plan_of(TinyModel(), **{key: ("block.0.up",)})
    with pytest.raises(PlanError, match=r"blocks\.0 \(Block\) holds 3 of them; write 'blocks\.0\.\*'"):
        plan_of(TinyModel(), **{key: ("blocks.0",)})
    with pytest.raises(PlanError, match=r"embed \(Embedding\) is never converted"):
        plan_of(TinyModel(), **{key: ("embed",)})


def test_nothing_converted_is_an_error():
    with pytest.raises(PlanError, match=r"the model has no nn\.Linear"):
        plan_of(nn.Sequential(nn.Embedding(8, 8)))
    with pytest.raises(PlanError, match=r"all 1 Linear are kept: 0 \(not a multiple of 16: 3, 5\)"):
        plan_of(nn.Sequential(nn.Linear(5, 3)))


def test_first_and_last_linear_stay_in_high_precision():
    plan = plan_of(TinyModel(blocks=2, tied=False), first_last_high_precision=True)
    assert reasons(plan) == {"blocks.0.up": "first or last Linear", "head": "first or last Linear"}


def test_min_features_keeps_small_layers():
    with pytest.raises(PlanError, match="fewer than min_features 33: 32"):
        plan_of(TinyModel(tied=False), min_features=33)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    assert swaps(plan_of(model, min_features=48)) == ["0"]


def test_mxfp8_wants_multiples_of_32():
    blackwell = Host("cuda", "B200", (10, 0), "2.20.2", "")
    plan = make_plan(Zoo(), settings(Recipe(kind="mxfp8")), host=blackwell)
    assert reasons(plan)["fine"] == "not a multiple of 32: 48"
    assert plan.decision("frozen").target == "te.Linear"


def test_zero_init_parameters_count_by_their_whole_shape():
    """Under zero.Init a weight is empty until it is gathered; its shape travels as ds_shape."""
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 17))
    for layer in model:
        for parameter in layer.parameters():
            parameter.ds_shape, parameter.ds_numel, parameter.ds_id = parameter.shape, parameter.numel(), 1
            parameter.data = torch.empty(0)
    plan = plan_of(model)
    assert swaps(plan) == ["0"] and reasons(plan) == {"1": "not a multiple of 16: 17"}
    assert plan.parameters[0].numel == 32 * 48


def test_an_fp8_model_is_not_planned_twice():
    from ds_fp8.layers import swap_layers

    model = TinyModel()
    swap_layers(model, plan_of(model))
    with pytest.raises(PlanError, match="restore_layers"):
        plan_of(model)


class Stage(nn.Sequential):
    """Looks like one stage of DeepSpeed's PipelineModule."""

    def __init__(self, stage_id: int, num_stages: int, *layers: nn.Module):
        super().__init__(*layers)
        self.stage_id, self.num_stages = stage_id, num_stages


def test_a_pipeline_stage_may_lack_what_a_pattern_names():
    """Patterns speak of the whole model; what matches nothing here is reported, not refused."""
    plan = plan_of(Stage(1, 3, nn.Linear(32, 32), nn.Linear(32, 32)), exclude=("7",), first_last_high_precision=True)
    assert plan.partial and plan.unmatched == ("exclude: 7",)
    assert len(swaps(plan)) == 2, "the first and the last Linear of the model are elsewhere"
    first = plan_of(Stage(0, 3, nn.Linear(32, 32), nn.Linear(32, 32)), first_last_high_precision=True)
    assert swaps(first) == ["1"]
    assert plan_of(Stage(2, 3, nn.GELU())).swaps == ()
