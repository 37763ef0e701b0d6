"""O3 under Transformer Engine: quantized values from outside are used as they are, and the 16-bit weight is never
looked at.

Quantized values made with the recipe's scale are what the layer would have made, so everything is equal to the bit.
Here against the fake, whose cache of quantized weights has the original's rules; tests/gpu/test_te_quantized_weight.py
has the original.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layers.small_models import settings
from layers.te.test_adapter import Pair, run
from ranks import run_ranks
from torch import nn

from ds_fp8 import kernels
from ds_fp8.errors import BackendError
from ds_fp8.formats import E4M3
from ds_fp8.layers import QuantizedWeight, swap_layers
from ds_fp8.layers.transformer_engine import names
from ds_fp8.layers.transformer_engine import quantized_weight as te_weight
from ds_fp8.numerics.scaling import scale_from_amax
from ds_fp8.plan import make_plan
from ds_fp8.recipe import HighPrecision, Recipe
from ds_fp8.zero.weights_released import is_released

RECIPES = [Recipe(amax_history_len=4), Recipe(amax_history_len=3, margin=1, interval=2), Recipe(kind="current")]


def build(recipe: Recipe, fuse: bool = False, **fp8):
    """Pair under Transformer Engine; 16-bit, because only then quantized values replace what the optimizer holds."""
    torch.manual_seed(0)
    model = Pair()
    plan = make_plan(model, settings(recipe, **fp8))
    fp8_state = swap_layers(
        model,
        replace(plan, fp8=replace(plan.fp8, backend="transformer_engine", fuse=fuse), zero_stage=2),
        managed=True,
    )
    fp8_state.optimized = frozenset(map(id, model.parameters()))
    return model, fp8_state


def code_weights(model: nn.Module, fp8_state, weights: dict[str, torch.Tensor]) -> None:
    """What the weight's owner does after a step, and the release of the 16-bit copy."""
    for name in ("up", "down"):
        layer, weight = getattr(model, name), weights[name]
        amax = kernels.amax(weight)
        if fp8_state.recipe.keeps_history:
            scale = fp8_state.weight_scale(layer, amax)
            fp8_state.record_weight_amax(layer, amax)
        else:
            scale = scale_from_amax(amax, E4M3)
        layer.quantized_weight = QuantizedWeight(kernels.quantize(weight, scale, E4M3), torch.reciprocal(scale))
        layer.weight.data = torch.full((1,), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)


def weights_of(model: nn.Module, factor: float) -> dict[str, torch.Tensor]:
    return {name: getattr(model, name).weight.detach().clone() * factor for name in ("up", "down")}


def three_steps(model: nn.Module, fp8_state, quantized: bool, micro: int = 2):
    """Each "step" has other weights; returns every result, and the FP8 state at the end."""
    base, found = weights_of(model, 1.0), []
    for step in range(3):
        now = {name: weight * (1.5**step) for name, weight in base.items()}
        if quantized:
            code_weights(model, fp8_state, now)
        else:
            for name, weight in now.items():
                getattr(model, name).weight.data = weight
        found += run(model, micro)
        fp8_state.update_scales()
        fp8_state.weights_changed()
    return found, fp8_state.state_dict()


def assert_equal(one, other):
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert torch.equal(mine, theirs)
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]) if isinstance(value, torch.Tensor) else value == other[1][name], name


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_results_gradients_and_histories_are_those_without_quantized_values(te, recipe, fuse):
    """The weight reads as NaN throughout, its quantizer is never called, its gradient arrives all the same."""
    baseline, quantized = build(recipe, fuse), build(recipe, fuse)
    expected = three_steps(*baseline, quantized=False)
    found = three_steps(*quantized, quantized=True)
    assert_equal(found, expected)
    model = quantized[0]
    for layer in (model.up, model.down):
        assert layer.weight.stride() == (0, 0) and layer.weight.grad.isfinite().all() and layer.weight.grad.any()
        assert layer.quantizers["scaling_fwd"][1].calls == 0
        assert layer._fp8_workspaces == {}


def test_wgrad_in_high_precision_needs_no_weight(te):
    """Of the three overrides it is the one that O3 allows: the product of input and grad_output."""
    recipe = Recipe(amax_history_len=4, override_linear_precision=HighPrecision(wgrad=True))
    assert_equal(three_steps(*build(recipe), quantized=True), three_steps(*build(recipe), quantized=False))


def test_the_transpose_is_made_once_a_step_and_goes_with_the_quantized_values(te):
    """`weight_cache`: micro-batches share one tensor; after the step nothing holds it."""
    model, fp8_state = build(RECIPES[0], weight_cache=True)
    code_weights(model, fp8_state, weights_of(model, 1.0))
    run(model, 1)
    kept = model.up.layer_state.wrapped
    run(model, 2)
    assert model.up.layer_state.wrapped is kept
    assert kept._data.data_ptr() == model.up.quantized_weight.data.data_ptr(), (
        "a view of the quantized values, not a copy"
    )
    fp8_state.weights_changed()
    assert model.up.layer_state.wrapped is None
    model, fp8_state = build(RECIPES[0])
    code_weights(model, fp8_state, weights_of(model, 1.0))
    run(model, 1)
    assert model.up.layer_state.wrapped is None, "by default nothing is kept"


def test_dropped_quantized_values_give_the_weight_back_to_transformer_engine(te):
    """A load: 16-bit weights again, quantized anew, and the quantized values' memory is not written."""
    model, fp8_state = build(Recipe(kind="current"))
    weights = weights_of(model, 1.0)
    run(model, 1)
    code_weights(model, fp8_state, weights)
    given = model.up.quantized_weight
    before = given.data.view(torch.uint8).clone()
    run(model, 2)
    for name, weight in weights.items():
        getattr(model, name).quantized_weight = None
        getattr(model, name).weight.data = weight * 3
    found = run(model, 1)
    other, _ = build(Recipe(kind="current"))
    for name, weight in weights.items():
        getattr(other, name).weight.data = weight * 3
    for mine, theirs in zip(found, run(other, 1), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(given.data.view(torch.uint8), before)


def test_eval_in_fp8_uses_quantized_values_and_leaves_training_alone(te):
    """Without gradients no transpose is needed; the next training call must not fall back to the released weight."""
    model, fp8_state = build(Recipe(kind="current"), eval=True)
    code_weights(model, fp8_state, weights_of(model, 1.0))
    with torch.no_grad():
        assert model.eval()(torch.randn(16, 32)).isfinite().all()
    with torch.inference_mode():
        assert model.eval()(torch.randn(16, 32)).isfinite().all()
    assert all(result.isfinite().all() for result in run(model, 1))


def test_a_layer_that_quantizes_all_the_same_is_an_error(te, monkeypatch):
    """An unknown version that ignores its cache would multiply with NaN: said by name, at the first call."""
    model, fp8_state = build(Recipe(kind="current"))
    code_weights(model, fp8_state, weights_of(model, 1.0))
    original = te.Linear.quantize_weight
    monkeypatch.setattr(
        te.Linear, "quantize_weight", lambda self, first, columnwise: (
            self._fp8_workspaces.clear(), original(self, first, columnwise))[1]
    )  # fmt: skip
    with pytest.raises(BackendError, match="did not take the quantized weight"):
        run(model, 1)


def test_a_transformer_engine_without_our_tensor_is_refused_before_training(te, monkeypatch):
    """With what differs, and the way out; and layers without a cache likewise."""
    model, _ = build(Recipe(kind="current"))
    model.up.verify_quantized()
    module = sys.modules["transformer_engine.pytorch.tensor.float8_tensor"]
    other = type("Float8Tensor", (), {"__new__": lambda cls, data, fp8_scale_inv: None})
    monkeypatch.setattr(module, "Float8Tensor", other)
    names.quantized_class.cache_clear()
    with pytest.raises(BackendError, match=r"lacks fp8_dtype, data_transpose, quantizer, update_usage.\n.*weight_wire"):
        model.up.verify_quantized()
    monkeypatch.undo()


def test_block_quantized_values_carry_scales_padded_to_four(te, monkeypatch):
    """Tiles of 128x128: [200, 300] has 2 x 3 scales, and the GEMM's rows are multiples of 4."""

    class Tiles(types.SimpleNamespace):
        def __new__(cls, *, rowwise_data, rowwise_scale_inv, columnwise_data, columnwise_scale_inv, fp8_dtype,
                    quantizer, is_2D_scaled, **kwargs):  # fmt: skip
            return super().__new__(cls)

        def update_usage(self, rowwise_usage=None, columnwise_usage=None):
            pass

    module = types.ModuleType("transformer_engine.pytorch.tensor.float8_blockwise_tensor")
    module.Float8BlockwiseQTensor = Tiles
    monkeypatch.setitem(sys.modules, module.__name__, module)
    quantizer = types.SimpleNamespace(dtype="e4m3", get_scale_shape=lambda shape, columnwise: (2, 4))
    scales = torch.arange(1.0, 7.0).view(2, 3)
    data = torch.zeros(200, 300, dtype=torch.float8_e4m3fn)
    made = te_weight.wrap(QuantizedWeight(data, scales), quantizer, torch.bfloat16, "block")
    assert made.rowwise_scale_inv.tolist() == [[1, 2, 3, 0], [4, 5, 6, 0]] and made.is_2D_scaled
    assert made.rowwise_data.shape == (200, 300) and made.columnwise_data is None


def test_a_scale_on_the_host_follows_its_quantized_values(monkeypatch):
    """Before its first forward the FP8 state lies on the CPU; its scale_inv there became an illegal memory access in
    cuBLASLt.
    """
    seen = {}
    monkeypatch.setattr(te_weight, "quantized_class", lambda kind: lambda **given: seen.update(given))
    data = torch.zeros(16, 32, dtype=torch.float8_e4m3fn, device="meta")
    te_weight.wrap(
        QuantizedWeight(data, torch.tensor(0.5)), types.SimpleNamespace(dtype="e4m3"), torch.bfloat16, "delayed"
    )
    assert seen["fp8_scale_inv"].device == seen["data"].device == torch.device("meta")


def trained(rank, world_size, stage, kind, gas):
    """O2 and O3 of one rank, with the fake Transformer Engine."""
    folder = Path(__file__).parent
    spec = importlib.util.spec_from_file_location("fake_te", folder / "fake_te.py")
    found = sys.modules["fake_te"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    rows = {}
    with pytest.MonkeyPatch.context() as patch:
        found.install(patch)
        from weights_jobs import full_weights, start, take_steps

        for level in ("O2", "O3"):
            engine, fp8_state = start(stage, level, kind=kind, gas=gas, backend="transformer_engine")
            losses = take_steps(engine, fp8_state, range(3))
            layers = {name: type(layer).__name__ for name, layer in engine.module.named_modules()}
            released = sum(map(is_released, engine.module.parameters()))
            rows[level] = (losses, full_weights(engine), take_steps(engine, fp8_state, range(3, 5)), layers, released)
    return rows


@pytest.mark.dist
@pytest.mark.parametrize(
    ("stage", "kind", "gas", "world_size"), [(2, "delayed", 2, 1), (2, "current", 1, 2), (3, "delayed", 2, 2)]
)
def test_o3_is_o2_to_the_bit_under_zero(stage, kind, gas, world_size):
    """Losses, weights, and losses after an export that brought the 16-bit weights back."""
    for rows in run_ranks(world_size, trained, stage, kind, gas, timeout_s=280):
        assert rows["O3"][0] == rows["O2"][0] and rows["O3"][2] == rows["O2"][2]
        for name, weight in rows["O2"][1].items():
            assert torch.equal(weight, rows["O3"][1][name]), name
        assert rows["O3"][3]["up"] == rows["O3"][3]["down"] == "TELinear"
        assert rows["O2"][4] == 0 and rows["O3"][4] == (2 if stage == 2 else 0)
