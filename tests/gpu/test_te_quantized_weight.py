"""O3 with the real Transformer Engine: quantized values in the place of its cached weight, equal to the bit, weight
never read.

Ours and its casts are the same quantized values (tests/golden), its transpose is that of the quantized values, so
outputs, gradients and histories with quantized values are those without; and O3 from JSON is O2 from JSON.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

te = pytest.importorskip("transformer_engine.pytorch")

from gpu.test_te_device import Fusable, Pair, run  # noqa: E402
from gpu.test_training_device import make_engine, one_rank, train  # noqa: E402, F401
from layers.small_models import settings  # noqa: E402

from ds_fp8 import kernels  # noqa: E402
from ds_fp8.formats import E4M3  # noqa: E402
from ds_fp8.layers import QuantizedWeight, swap_layers  # noqa: E402
from ds_fp8.numerics.scaling import scale_from_amax  # noqa: E402
from ds_fp8.plan import make_plan  # noqa: E402
from ds_fp8.recipe import HighPrecision, Recipe  # noqa: E402
from ds_fp8.zero.weights_released import is_released  # noqa: E402

RECIPES = [Recipe(amax_history_len=4), Recipe(amax_history_len=4, fp8_format="E4M3", margin=1, interval=2),
           Recipe(kind="current"), Recipe(kind="block"),
           Recipe(amax_history_len=4, override_linear_precision=HighPrecision(wgrad=True))]  # fmt: skip


class Wide(Pair):
    """No dimension is a multiple of 128: tiles at the edges, scales that need padding."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(128, 208), nn.LayerNorm(208)
        self.rms, self.down = nn.RMSNorm(208, eps=1e-6), nn.Linear(208, 128, bias=False)


def build(recipe, kind=Pair, fuse=False, **fp8):
    torch.manual_seed(0)
    model = kind().to("cuda", torch.bfloat16)
    plan = make_plan(model, settings(recipe, **fp8), device="cuda")
    fp8_plan = replace(plan.fp8, backend="transformer_engine", fuse=fuse)
    fp8_state = swap_layers(model, replace(plan, fp8=fp8_plan, zero_stage=2), managed=True)
    fp8_state.optimized = frozenset(map(id, model.parameters()))
    return model, fp8_state


def code_weights(model, fp8_state, weights):
    """What the owner does after a step, and the release of the 16-bit copy."""
    for name, weight in weights.items():
        layer = getattr(model, name)
        layer.verify_quantized()
        if fp8_state.recipe.kind == "block":
            layer.quantized_weight = QuantizedWeight(*kernels.quantize_128x128(weight, E4M3))
        else:
            amax = kernels.amax(weight)
            scale = scale_from_amax(amax, E4M3)
            if fp8_state.recipe.keeps_history:
                scale = fp8_state.weight_scale(layer, amax)
                fp8_state.record_weight_amax(layer, amax)
            layer.quantized_weight = QuantizedWeight(kernels.quantize(weight, scale, E4M3), torch.reciprocal(scale))
        layer.weight.data = torch.full((1,), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)


def three_steps(model, fp8_state, quantized):
    base = {name: getattr(model, name).weight.detach().clone() for name in ("up", "down")}
    found = []
    for step in range(3):
        now = {name: weight * (1.5**step) for name, weight in base.items()}
        if quantized:
            code_weights(model, fp8_state, now)
        else:
            for name, weight in now.items():
                getattr(model, name).weight.data = weight
        found += run(model, 2)
        fp8_state.update_scales()
        fp8_state.weights_changed()
    return found, fp8_state.state_dict()


@pytest.mark.parametrize("kind", [Pair, Wide])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_everything_is_equal_to_the_bit_with_quantized_values(recipe, kind):
    expected, state = three_steps(*build(recipe, kind), quantized=False)
    model, fp8_state = build(recipe, kind)
    found, quantized_state = three_steps(model, fp8_state, quantized=True)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all() and torch.equal(one, other), f"off by {float((one - other).abs().max())}"
    for name, value in state.items():
        assert (
            torch.equal(value, quantized_state[name])
            if isinstance(value, torch.Tensor)
            else value == quantized_state[name]
        )
    for layer in (model.up, model.down):
        assert layer.weight.stride() == (0, 0) and layer.weight.grad.any() and layer._fp8_workspaces == {}


@pytest.mark.parametrize("recipe", RECIPES[:4], ids=str)
def test_fused_layers_take_quantized_values_too(recipe):
    expected, _ = three_steps(*build(recipe, Fusable, fuse=True), quantized=False)
    found, _ = three_steps(*build(recipe, Fusable, fuse=True), quantized=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_uses_the_same_quantized_values(reentrant):
    expected, _ = three_steps(*build(RECIPES[0], lambda: Pair(reentrant)), quantized=False)
    found, _ = three_steps(*build(RECIPES[0], lambda: Pair(reentrant)), quantized=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_eval_then_training_and_back_to_16_bits():
    """A cached weight without transpose is thrown away by Transformer Engine; ours always has one."""
    model, fp8_state = build(Recipe(kind="current"), eval=True)
    weights = {name: getattr(model, name).weight.detach().clone() for name in ("up", "down")}
    before = run(model, 2)
    code_weights(model, fp8_state, weights)
    x = torch.randn(32, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()
    model.train()
    quantized = run(model, 2)
    for name, weight in weights.items():
        getattr(model, name).quantized_weight = None
        getattr(model, name).weight.data = weight
    for one, other, again in zip(before, quantized, run(model, 2), strict=True):
        assert torch.equal(one, other) and torch.equal(one, again)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_o3_from_json_is_o2(recipe, stage):
    """One rank: the same losses, and in ZeRO-2 the 16-bit copy of every FP8 weight is really gone."""
    fp8 = {"enabled": True, "recipe": recipe, "backend": "transformer_engine"}
    fp8 |= {"amax_history_len": 4} if recipe == "delayed" else {}
    losses, released = {}, {}
    for level in ("O2", "O3"):
        engine = make_engine(
            stage, fp8=fp8, msamp={"enabled": True, "opt_level": level}, gradient_accumulation_steps=2,
            # At 0 nothing stays resident, so every gather of ZeRO-3 carries quantized values.
            zero_optimization={"stage": stage, "stage3_param_persistence_threshold": 0},
        )  # fmt: skip
        losses[level] = train(engine, 8)
        layers = [module for module in engine.module.modules() if type(module).__name__ == "TELinear"]
        assert len(layers) == 4
        released[level] = sum(is_released(layer.weight) for layer in layers)
        if stage == 3 and level == "O3":
            assert len(engine.optimizer.fp8_chunks) == 4 and engine.optimizer.fp8_quantized_fresh
        engine.destroy()
    assert losses["O3"] == losses["O2"]
    assert released == {"O2": 0, "O3": 4 if stage == 2 else 0}
