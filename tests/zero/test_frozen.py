"""`fp8.frozen_weights: "fp8"`: LoRA's base in quantized form alone, read by everybody, merged and loaded as 16 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from torch import nn

from ds_fp8.config.settings import DeepSpeedFacts, Fp8Settings, Settings
from ds_fp8.errors import PlanError
from ds_fp8.formats import E4M3
from ds_fp8.layers import restore_layers, swap_layers
from ds_fp8.layers.recipes import scaling_of
from ds_fp8.plan import estimate, make_plan
from ds_fp8.recipe import HighPrecision, Recipe
from ds_fp8.zero.frozen_weights import FrozenWeights
from ds_fp8.zero.weights_released import is_released
from tests.layers.test_conv1d import gpt2
from tests.layers.test_experts import mixture
from tests.zero.model_jobs import train_lora


def settings(kind: str = "delayed", stage: int = 2, **recipe) -> Settings:
    fp8 = Fp8Settings(True, recipe=Recipe(kind=kind, **recipe), frozen_weights="fp8")
    return Settings(fp8, deepspeed=DeepSpeedFacts(zero_stage=stage, base_dtype="bf16"))


def base() -> nn.Module:
    """A frozen layer, a trained one, and one whose weight another layer shares."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))).bfloat16()
    model[3].weight = model[2].weight
    for place in (0, 2):
        model[place].weight.requires_grad_(False)
    return model


def frozen(model: nn.Module, kind: str) -> FrozenWeights:
    plan = make_plan(model, settings(kind))
    assert plan.fp8.frozen_weights == ("0.weight",)
    assert "frozen weights of 1 Linear are kept in FP8 alone" in plan.banner()
    swap_layers(model, plan)
    weights = FrozenWeights(model, plan)
    weights.freeze()
    return weights


@pytest.mark.parametrize("by_tiles", [False, True])
def test_decoding_is_exact_in_bf16_and_casting_again_changes_nothing(by_tiles):
    """Powers of two: what a checkpoint or a merge gets is what was trained with, and a resumed run trains with it
    again.
    """
    torch.manual_seed(0)
    weight = (torch.randn(256, 384) * torch.logspace(-6, 0, 384)).bfloat16()
    model = nn.Sequential(nn.Linear(384, 256).bfloat16().requires_grad_(False))
    model[0].weight.data = weight.clone()
    swap_layers(model, plan := make_plan(model, settings("block" if by_tiles else "current")))
    first, second = FrozenWeights(model, plan), FrozenWeights(model, plan)
    first.freeze()
    exact = model[0].weight.float()
    first.thaw()
    assert torch.equal(model[0].weight.float(), exact), "bf16 holds every decoded value"
    second.freeze()
    assert torch.equal(model[0].weight.float(), exact)
    error = (exact - weight.float()).abs() / weight.float().abs()
    assert (
        error.quantile(0.5) < 2**-4
        and scaling_of("block" if by_tiles else "current").quantize_frozen(weight, E4M3).data.element_size() == 1
    )


@pytest.mark.parametrize("kind", ["delayed", "current", "block"])
def test_one_byte_is_left_and_the_layer_computes_with_it(kind):
    """The Parameter's memory is one element; forward and dgrad are those of a layer whose weight has the decoded
    values.
    """
    model, other = base(), base()
    weights = frozen(model, kind)
    layer = model[0]
    assert is_released(layer.weight) and layer.weight.shape == (32, 32) and layer.weight.dtype == torch.bfloat16
    assert layer.quantized_weight.data.element_size() == 1
    with torch.no_grad():
        other[0].weight.copy_(layer.weight)
    swap_layers(other, make_plan(other, settings(kind)))
    x = torch.randn(5, 32).bfloat16().requires_grad_()
    y = x.detach().clone().requires_grad_()
    for one, two in ((model(x), other(y)),):
        one.float().square().sum().backward()
        two.float().square().sum().backward()
    if kind == "block":  # scales of powers of two there too, so the other layer casts to the same values
        assert torch.equal(x.grad, y.grad)
    elif kind == "current":
        assert (x.grad - y.grad).float().norm() < 0.15 * y.grad.float().norm()
    assert torch.isfinite(x.grad).all() and x.grad.any()
    weights.thaw()
    assert type(layer.weight) is nn.Parameter and torch.equal(layer.weight, other[0].weight)


def test_reads_see_it_and_writes_bring_the_16_bits_back():
    """A norm, a state dict; then `weight.data += delta`, as PEFT merges: afterwards it is a 16-bit weight."""
    model = base()
    frozen(model, "current")
    weight = model[0].weight
    values = weight.float().clone()
    assert torch.equal(model.state_dict()["0.weight"].float(), values)
    assert torch.allclose(weight.float().norm(), values.norm()) and is_released(weight)
    weight.data += 1.0
    assert not is_released(weight) and model[0].quantized_weight is None
    assert torch.equal(weight.float(), (values.bfloat16() + 1.0).float())
    model[0].weight.data.mul_(2.0)
    assert torch.equal(weight.float(), ((values.bfloat16() + 1.0) * 2).float())


@pytest.mark.parametrize("write", ["copy_", "data", "view", "load"])
def test_every_way_to_write(write):
    model = base()
    frozen(model, "block")
    weight, new = model[0].weight, torch.ones(32, 32).bfloat16()
    with torch.no_grad():
        if write == "copy_":
            weight.copy_(new)
        elif write == "data":
            weight.data = new
        elif write == "view":
            weight.data[0].fill_(1.0)
            new = weight.detach().clone()
            assert (new[0] == 1).all() and not (new[1] == 1).all()
        else:
            model.load_state_dict({**model.state_dict(), "0.weight": new})
    assert not is_released(weight) and torch.equal(weight, new)


@pytest.mark.parametrize("kind", ["current", "block"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "GPT2"])
def test_experts_and_conv1d(name, kind):
    """[experts, out, in], [experts, in, out] and [in, out]: one byte is left of each; what a layer gives, and its
    gradient, are those of the decoded weights within FP8's error; under `block` a layer that casts for itself casts to
    the same data. Evaluation reads them, and a write brings 16 bits back.
    """
    model = gpt2() if name == "GPT2" else mixture(name)
    model.requires_grad_(False)
    kept = [fqn for fqn, _ in model.named_parameters() if "experts." in fqn or (name == "GPT2" and ".c_" in fqn)]
    kept = [fqn for fqn in kept if "bias" not in fqn]
    plan = make_plan(model, settings(kind, fp8_format="E4M3"))
    assert set(kept) <= set(plan.fp8.frozen_weights) and ("Conv1D" if name == "GPT2" else "Experts") in plan.banner()
    swap_layers(model, plan)
    layer = model.get_submodule(kept[-1].rpartition(".")[0])
    wide = layer.weight.shape[0] if name == "GPT2" else 64
    index = torch.rand(40, 4, generator=torch.Generator().manual_seed(3)).topk(2).indices
    routing = () if name == "GPT2" else (index, torch.full((40, 2), 0.5))

    def visited(training: bool) -> list[torch.Tensor]:
        x = torch.randn(40, wide, generator=torch.Generator().manual_seed(4)).requires_grad_()
        out = layer.train(training)(x, *routing)
        out.backward(torch.randn(40, out.shape[1], generator=torch.Generator().manual_seed(5)))
        return [out.detach(), x.grad]

    weights = FrozenWeights(model, plan)
    weights.freeze()
    assert all(is_released(model.get_parameter(fqn)) for fqn in kept)
    found, read = visited(True), visited(False)
    weights.thaw()
    exact, again = visited(False), visited(True)
    assert all(map(torch.equal, read, exact)), "in eval mode, with high precision, the values that were kept"
    for one, other, by_itself in zip(found, exact, again, strict=True):
        assert 1e-3 < (one - other).norm() / other.norm() < 0.1
        assert torch.equal(one, by_itself) or kind != "block"
    assert not any(map(is_released, restore_layers(model).parameters()))


def test_what_cannot_be_kept_so_is_refused():
    trained = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(PlanError, match=r"fp8/frozen_weights: fp8: no FP8 layer .* has a frozen weight"):
        make_plan(trained, settings())
    in_files = replace(
        settings(stage=3), deepspeed=DeepSpeedFacts(zero_stage=3, base_dtype="bf16", offload_param="nvme")
    )
    with pytest.raises(PlanError, match=r"(?s)nvme keeps the 16-bit weights in files.*Offload parameters to cpu"):
        make_plan(base(), in_files)
    with pytest.raises(PlanError, match="no FP8 layer"):
        make_plan(base(), settings(override_linear_precision=HighPrecision(dgrad=True)))


def test_the_estimate_counts_one_byte():
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    model[0].requires_grad_(False)
    ours = estimate(make_plan(model, settings(stage=2)), zero_stage=2)
    assert ours.device.weights == 256 * 256 * (1 + 2)


@pytest.mark.dist
@pytest.mark.parametrize("stages", [(0, 1, 2)])
def test_lora_of_peft_trains_saves_resumes_and_merges(stages, tmp_path):
    """Losses beside those with a 16-bit base; the base 1 byte; a resumed run to the bit; adapters and merge as ever."""
    pytest.importorskip("peft")
    for rank, found in enumerate(run_ranks(2, train_lora, list(stages), str(tmp_path), timeout_s=500)):
        for stage in stages:
            ours, baseline = found[f"fp8 {stage}"], found[f"high_precision {stage}"]
            assert ("frozen weights of 14 Linear are kept in FP8 alone" in ours["said"]) == (rank == 0)
            assert ours["released"] == 14 and baseline["released"] == 0 and "frozen weights" not in baseline["said"]
            assert (
                ours["losses"] == pytest.approx(baseline["losses"], rel=0.02) and ours["losses"] != baseline["losses"]
            )
            assert ours["losses"][-1] < ours["losses"][0] - 0.1
            assert ours["resumed"] == ours["after"]
            assert ours["adapters"] == baseline["adapters"] and ours["adapters"]
            assert ours["merged_classes"] == ["Embedding", "Linear"] and ours["merged_error"] < 0.02
