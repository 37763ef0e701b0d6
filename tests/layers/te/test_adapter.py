"""The Transformer Engine backend against the torch backend, which golden vectors hold to the real thing.

Both run the same model on the same data; scales and histories must agree bit for bit, whatever happens around: gradient
accumulation, recompute, eval, overrides, padding. The fake keeps Transformer Engine's habits (see `fake_te.py`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from layers.small_models import settings
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_fp8.errors import BackendError, LayerError
from ds_fp8.layers import restore_layers, swap_layers
from ds_fp8.layers.transformer_engine import names
from ds_fp8.layers.transformer_engine.scaling import make_recipe
from ds_fp8.plan import make_plan
from ds_fp8.recipe import HighPrecision, Recipe


class Pair(nn.Module):
    """norm, two linear layers, one of them without bias; the block in between may be recomputed."""

    def __init__(self, recompute: bool | None = None):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 48)
        self.rms, self.down = nn.RMSNorm(48, eps=1e-6), nn.Linear(48, 32, bias=False)
        self.recompute = recompute

    def forward(self, x):
        if self.recompute is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.recompute)

    def block(self, x):
        return x + self.down(self.rms(torch.relu(self.up(self.norm(x)))))


def both_backends(recipe: Recipe | None = None, recompute: bool | None = None, managed: bool = False, **fp8):
    """The same model under both backends, with their FP8 states; `managed`: as an engine would hold them."""
    torch.manual_seed(0)
    ours = Pair(recompute)
    theirs = copy.deepcopy(ours)
    found = []
    for model, backend in ((ours, "torch"), (theirs, "transformer_engine")):
        plan = make_plan(model, settings(recipe, **fp8))
        fp8_state = swap_layers(model, replace(plan, fp8=replace(plan.fp8, backend=backend)), managed=managed)
        fp8_state.optimized = frozenset(map(id, model.parameters()) if managed else ())
        found.append((model, fp8_state))
    return found


def run(model, steps=3, tokens=16, train=True):
    """A few passes with growing inputs; outputs and gradients of the last."""
    generator = torch.Generator().manual_seed(5)
    model.train(train)
    for index in range(steps):
        x = (torch.randn(2, tokens // 2, 32, generator=generator) * (index + 1)).requires_grad_()
        model.zero_grad()
        output = model(x)
        (output * torch.linspace(-1, 1, 32)).sum().backward()
    return [output.detach(), x.grad] + [parameter.grad for parameter in model.parameters()]


def assert_same_state(ours, theirs):
    for fp8_state in (ours, theirs):
        fp8_state.update_scales()
    for name, tensor in ours.state_dict().items():
        other = theirs.state_dict()[name]
        if isinstance(tensor, torch.Tensor):
            # An amax behind the first layer is a sum of 48 products in another order; the rest is equal to the bit.
            torch.testing.assert_close(
                other, tensor, rtol=48 * 2**-24, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert tensor == other, name


def assert_close(found, wanted):
    """fp32 sums of the same products in another order: 64 terms, each off by half an ulp at most."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=64 * 2**-24, atol=64 * 2**-24 * float(other.abs().max()))


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("fp8_format", ["HYBRID", "E4M3"])
def test_scales_histories_and_results_are_the_torch_backends(te, fp8_format, algorithm):
    """Delayed scaling with all its arguments: what Transformer Engine ignores is done by the FP8 state for both."""
    recipe = Recipe(fp8_format=fp8_format, amax_history_len=3, amax_compute_algo=algorithm, margin=1, interval=2)
    (ours, fp8_state), (theirs, their_state) = both_backends(recipe)
    assert type(theirs.up).__name__ == "TELinear" and isinstance(theirs.norm, te.LayerNorm)
    assert_close(run(theirs, 5), run(ours, 5))
    assert_same_state(fp8_state, their_state)
    assert fp8_state.scales.unique().numel() > 3, "the scales must have moved for this to mean anything"


def test_the_global_update_of_transformer_engine_never_touches_us(te):
    """One autocast per layer would roll all histories once per layer, forward and backward."""
    from fake_te import Manager

    _, (theirs, _) = both_backends()
    run(theirs, 2)
    assert Manager.updates == 0 and Manager.depth == 0
    assert Manager.buffers == {"scaling_fwd": [], "scaling_bwd": []}


@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_records_once_and_the_backward_still_records(te, reentrant):
    """Activation checkpointing runs the forward twice; its histories must equal those without."""
    (baseline, fp8_state), _ = both_backends()
    _, (theirs, their_state) = both_backends(recompute=reentrant)
    assert_close(run(theirs, 4), run(baseline, 4))
    assert_same_state(fp8_state, their_state)


@pytest.mark.parametrize("name", ["fprop", "dgrad", "wgrad"])
def test_override_linear_precision_takes_each_product(te, name):
    """Transformer Engine dropped this argument; the product in question must be the torch backend's high-precision
    one.
    """
    recipe = Recipe(amax_history_len=4, override_linear_precision=HighPrecision(**{name: True}))
    (ours, _), (theirs, _) = both_backends(recipe)
    assert_close(run(theirs, 1), run(ours, 1))


@pytest.mark.parametrize("tokens", [2, 10, 22])
def test_tokens_are_padded_to_sixteen(te, tokens):
    """8 or 24 tokens fail in the backward on Hopper; rows of zeros change nothing for the others."""
    (ours, fp8_state), (theirs, their_state) = both_backends()
    assert_close(run(theirs, 3, tokens), run(ours, 3, tokens))
    assert_same_state(fp8_state, their_state)


def test_current_scaling(te):
    """No history, no slots: the quantizers are left alone."""
    (ours, _), (theirs, _) = both_backends(Recipe(kind="current"))
    assert_close(run(theirs, 2), run(ours, 2))


def test_weight_cache_quantizes_once_per_optimizer_step(te):
    """Four micro-batches, one cast of the weight; after `weights_changed` one more."""
    _, (theirs, fp8_state) = both_backends(weight_cache=True, managed=True)
    run(theirs, 4)
    # The cached weight keeps a copy of the quantizer, which is asked when the weight has changed.
    assert theirs.up.quantizers["scaling_fwd"][1].calls == 1
    assert theirs.up._fp8_workspaces["weight"]._quantizer.calls == 0
    fp8_state.weights_changed()
    run(theirs, 2)
    assert theirs.up.quantizers["scaling_fwd"][1].calls == 1
    assert theirs.up._fp8_workspaces["weight"]._quantizer.calls == 1
    _, (theirs, _) = both_backends(weight_cache=False)
    run(theirs, 4)
    assert theirs.up.quantizers["scaling_fwd"][1].calls == 4


def test_a_cached_weight_is_cast_with_the_scale_of_its_own_step(te):
    """Under delayed scaling the copy of the quantizer in the cache kept the scale of the first step, for ever.

    Weights of 0.02 then lay among e4m3's subnormals. Counterparts: our layers, and one without a cache whose weight is
    the same.
    """
    (ours, fp8_state), (theirs, their_state) = both_backends(weight_cache=True, managed=True)
    for _ in range(3):
        assert_close(run(theirs, 2), run(ours, 2))
        assert_same_state(fp8_state, their_state)
        cached = theirs.up._fp8_workspaces["weight"]
        assert float(cached._quantizer.scale) == float(1 / cached._scale_inv)
        for one in (fp8_state, their_state):
            one.weights_changed()
    scale = float(1 / theirs.up._fp8_workspaces["weight"]._scale_inv)
    assert scale == pytest.approx(448 / float(theirs.up.weight.detach().abs().max()))


def test_eval_is_in_high_precision_unless_asked_and_never_records(te):
    """`eval: false` computes nn.Linear's bits; `eval: true` computes in FP8 and leaves the histories alone."""
    _, (theirs, fp8_state) = both_backends()
    run(theirs, 2)
    x = torch.randn(4, 8, 32)
    theirs.eval()
    with torch.no_grad():
        found = theirs(x)
        wanted = restore_layers(copy.deepcopy(theirs))(x)
    assert torch.equal(found, wanted)
    _, (theirs, fp8_state) = both_backends(eval=True)
    run(theirs, 2)
    before = fp8_state.state_dict()
    theirs.eval()
    with torch.no_grad():
        assert not torch.equal(theirs(x * 100), wanted)
    after = fp8_state.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in ("scales", "forward_history", "backward_history"))


def test_start_step_is_high_precision_but_fills_the_histories(te):
    """So that FP8 starts with scales that fit, on either backend."""
    (ours, fp8_state), (theirs, their_state) = both_backends(start_step=2)
    assert_close(run(theirs, 2), run(ours, 2))
    assert_same_state(fp8_state, their_state)
    assert float(their_state.state_dict()["forward_history"].max()) > 0


def test_parameters_names_and_state_dict_are_the_unmodified_models(te):
    """Identity of Parameters, strict loading both ways, no `_extra_state`; and back again."""
    torch.manual_seed(0)
    model = Pair()
    baseline = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    plan = make_plan(model, settings())
    swap_layers(model, replace(plan, fp8=replace(plan.fp8, backend="transformer_engine")))
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert list(model.state_dict()) == list(baseline.state_dict())
    baseline.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(baseline.state_dict(), strict=True)
    restored = restore_layers(model)
    assert type(restored.up) is nn.Linear and type(restored.norm) is nn.LayerNorm and type(restored.rms) is nn.RMSNorm
    assert all(value is parameters[name] for name, value in restored.named_parameters())
    x = torch.randn(4, 32)
    assert torch.equal(restored.eval()(x), baseline.eval()(x))


def test_a_second_derivative_is_refused_by_the_layers_name(te):
    """Also where every scale is known and no engine is there; Transformer Engine's own backward would leave it out."""
    _, (theirs, _) = both_backends(Recipe(amax_history_len=2))
    for _ in range(2):
        x = torch.randn(16, 32, requires_grad=True)
        with pytest.raises(LayerError, match=r'fp8/layers/exclude \["down"\]'):
            torch.autograd.grad(theirs(x).sum(), x, create_graph=True)
        theirs(x).sum().backward()


def test_a_second_backward_through_one_forward_is_refused_by_name(te):
    """Transformer Engine frees what it has kept for wgrad in the first one; where there is no wgrad it does not."""
    _, (theirs, _) = both_backends(Recipe(amax_history_len=2))
    for trained in (True, False):
        theirs.requires_grad_(trained)
        loss = theirs(torch.randn(16, 32, requires_grad=True)).sum()
        loss.backward(retain_graph=True)
        refused = pytest.raises(LayerError, match=r"down: a second backward.*\n.*fp8/backend to torch")
        with refused if trained else contextlib.nullcontext():
            loss.backward()


def test_frozen_weights_get_no_gradient(te):
    """A LoRA base: frozen stays frozen, also where wgrad is overridden."""
    for high in (HighPrecision(), HighPrecision(wgrad=True)):
        _, (theirs, _) = both_backends(Recipe(amax_history_len=2, override_linear_precision=high))
        theirs.up.weight.requires_grad_(False)
        theirs(torch.randn(16, 32, requires_grad=True)).sum().backward()
        assert theirs.up.weight.grad is None and theirs.down.weight.grad is not None
        assert not theirs.up.weight.requires_grad and theirs.down.weight.requires_grad


def test_a_recipe_that_the_device_lacks_is_refused(te):
    """By name and with the reason, whether the device or the installed version is what lacks it."""
    with pytest.raises(BackendError, match=r"mxfp8: this device does not run it .*10.0 or higher"):
        make_recipe(names.load(), Recipe(kind="mxfp8"))
    with pytest.raises(BackendError, match="has no Float8BlockScaling"):
        make_recipe(names.load(), Recipe(kind="block"))


def test_an_unknown_transformer_engine_is_refused_with_what_differs(te):
    """Moved or renamed arguments are named, before a layer is built."""
    del te.RMSNorm
    te.Linear = type("Linear", (te.Linear,), {"__init__": lambda self, rows, columns: None})
    with pytest.raises(BackendError) as error:
        names.load()
    assert "pytorch.RMSNorm is missing" in str(error.value)
    assert "pytorch.Linear lacks in_features, out_features, bias, params_dtype, device" in str(error.value)


def test_not_installed_is_a_clear_error(monkeypatch):
    """The metapackage without a build raises RuntimeError on import: caught, with the way out."""
    import sys

    names.load.cache_clear()
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(BackendError, match=r"cannot be imported.*\n.*set fp8/backend to torch"):
        names.load()
    names.load.cache_clear()


def test_the_class_can_be_pickled_by_name(te):
    """Copies of a model and saved modules name the class; the module makes it on demand."""
    from ds_fp8.layers.transformer_engine import linear

    assert pickle.loads(pickle.dumps(linear.TELinear)) is linear.linear_class()


def test_a_whole_model_can_be_saved_and_drawn_again_as_nn_linear_would(te):
    """Transformer Engine's own initialisers are functions made in functions, and draw other values."""
    _, (model, _) = both_backends()
    x, file = torch.randn(16, 32), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    layer = model.up
    layer.reset_parameters()
    bound = layer.in_features**-0.5
    for parameter in (layer.weight, layer.bias):
        assert 0.5 * bound < parameter.abs().max() <= bound
