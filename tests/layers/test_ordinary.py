"""Calls and backwards that FP8 casts have no rule for: high precision for that call, or each gradient by itself, and
never an error of torch's that names no layer.

Beside each case stands the control, the same model with nn.Linear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from ds_fp8.engine.first_step import verdict
from ds_fp8.layers.ran import watch
from ds_fp8.plan import make_plan
from ds_fp8.recipe import Recipe
from tests.layers.small_models import settings, swapped
from tests.layers.test_experts import TEXT, experts_of, mixture
from tests.layers.test_like_linear import KINDS, ROUNDING, WIDTH, error, pair

EVERY_KIND = [*KINDS, "rowwise"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_a_parameter_with_a_forward_derivative(kind, name):
    """The tangent is on a parameter, none is on the input: that layer in high precision, and those behind it."""
    found = []
    for model in pair(kind)[:2]:
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
        layer, place = model.get_submodule(name.split(".")[0]), name.split(".")[1]
        value = layer._parameters.pop(place)
        with forward_ad.dual_level():
            setattr(layer, place, forward_ad.make_dual(value.detach(), torch.ones_like(value)))
            found.append(forward_ad.unpack_dual(model(x)).tangent)
    assert found[0].any()
    assert torch.equal(*found) if name.startswith("0") else error(found[1], found[0]) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_make_fx_writes_the_layer_down_in_high_precision(kind):
    control, model, fp8_state = pair(kind)
    x = torch.randn(16, WIDTH)
    graph = make_fx(model)(x)
    assert torch.equal(graph(2 * x), control(2 * x))
    assert not any("ds_fp8" in str(node.target) for node in graph.graph.nodes)
    assert not fp8_state.pending.any(), "what is traced leaves no amax"
    assert not torch.equal(model(x), control(x)), "an ordinary call is in FP8 again"


def with_grads_batched(model: nn.Module, x: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(model(x), x, gradients, is_grads_batched=True)[0]


def with_vmap(model: nn.Module, x: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    output = model(x)
    return torch.func.vmap(lambda one: torch.autograd.grad(output, x, one, retain_graph=True)[0])(gradients)


def with_vmap_twice(model: nn.Module, x: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """The gradients' batch axis is the outer one's last; the inner transform has nothing of it."""
    output = model(x)

    def inner(one: torch.Tensor) -> torch.Tensor:
        def each(factor: torch.Tensor) -> torch.Tensor:
            return factor * torch.autograd.grad(output, x, one, retain_graph=True)[0]

        return torch.func.vmap(each)(torch.ones(2))[1]

    return torch.func.vmap(inner, in_dims=-1)(gradients.movedim(0, -1))


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("batched", [with_grads_batched, with_vmap, with_vmap_twice])
def test_gradients_in_a_batch_are_those_of_a_loop(batched: Callable[..., torch.Tensor], kind):
    """Each has a scale of its own where the recipe gives it one: three gradients of very different sizes."""
    _, model, fp8_state = pair(kind)
    x = torch.randn(16, WIDTH, requires_grad=True)
    gradients = torch.randn(3, 16, WIDTH) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    model(x).sum().backward()
    fp8_state.update_scales()
    wanted = [torch.autograd.grad(model(x), x, one)[0] for one in gradients]
    pending = fp8_state.pending.clone()
    fp8_state.pending.zero_()
    for found, one in zip(batched(model, x, gradients), wanted, strict=True):  # vmap rounds GELU's derivative its way
        assert error(found, one) < 2**-10
    assert torch.allclose(fp8_state.pending, pending, rtol=1e-5), "amaxes of all of them"


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobians(vectorize):
    control, model, _ = pair("current")
    found, wanted = (
        torch.autograd.functional.jacobian(each, torch.ones(1, WIDTH), vectorize=vectorize) for each in (model, control)
    )
    assert found.shape == wanted.shape and (found - wanted).norm() < 0.1 * wanted.norm()


def test_weights_gradients_in_a_batch():
    _, model, _ = pair("current")
    x, gradients = torch.randn(16, WIDTH), torch.randn(3, 16, WIDTH)
    output, params = model(x), tuple(model.parameters())
    found = torch.autograd.grad(output, params, gradients, is_grads_batched=True, retain_graph=True)
    for place, one in enumerate(gradients):
        wanted = torch.autograd.grad(output, params, one, retain_graph=True)
        assert all(torch.equal(batch[place], alone) for batch, alone in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_experts(name):
    """Derivatives of torch.func: as the class computed before, to the bit; a batch of gradients: each by itself."""
    control = mixture(name)
    model = copy.deepcopy(control)
    swapped(model, Recipe(kind="current"))
    found = []
    for each in (control, model):
        experts = next(iter(experts_of(each).values()))
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(40, TEXT["hidden_size"], generator=generator)
        index = torch.rand(40, experts.num_experts, generator=generator).topk(2).indices
        weights = torch.rand(40, 2, generator=generator)

        def call(x: torch.Tensor, experts: nn.Module = experts, index=index, weights=weights) -> torch.Tensor:
            return experts(x, index, weights)

        found.append(torch.func.grad(lambda x, call=call: call(x).pow(2).sum())(x))
        if each is model:
            x.requires_grad_()
            output = call(x)
            gradients = torch.randn(2, *output.shape)
            batch = torch.autograd.grad(output, x, gradients, is_grads_batched=True, retain_graph=True)[0]
            alone = [torch.autograd.grad(output, x, one, retain_graph=True)[0] for one in gradients]
            assert torch.equal(batch, torch.stack(alone))
    assert found[0].any() and torch.equal(*found)


@pytest.mark.parametrize("call", ["nested", "vmap"])
def test_the_first_step_names_the_reason(call):
    """Not "never called", nor "in eval mode"."""
    control, model, _ = pair("current")
    plan, (ran,), x = make_plan(control, settings()), watch([model[0]], on=True), torch.randn(8, WIDTH)
    if call == "nested":
        model(torch.nested.nested_tensor([x[:3], x], layout=torch.jagged))
    else:
        torch.func.vmap(model)(x)
    text, is_good = verdict({"0": ran.bits()}, 1, plan)
    assert not is_good and "called only as FP8 casts cannot take it, so in high precision" in text
    model(x)
    assert verdict({"0": ran.bits()}, 1, plan)[0].count("FP8 casts") == 0


def grad_of_weights(model: nn.Module, x: torch.Tensor, **options: Any) -> torch.Tensor:
    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x,)).pow(2).sum()

    weights = {name: param.detach() for name, param in model.named_parameters()}
    return torch.compile(torch.func.grad(loss), **options)(weights, x)["0.weight"]


def grad_per_sample(model: nn.Module, x: torch.Tensor, **options: Any) -> torch.Tensor:
    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x,)).pow(2).sum()

    weights = {name: param.detach() for name, param in model.named_parameters()}
    return torch.compile(torch.func.vmap(torch.func.grad(loss), (None, 0)), **options)(weights, x)["2.weight"]


COMPILED = {
    "grad": grad_of_weights,
    "vmap of grad": grad_per_sample,
    "vmap": lambda model, x, **options: torch.compile(torch.func.vmap(model), **options)(x),
    "vmap around": lambda model, x, **options: torch.func.vmap(torch.compile(model, **options))(x),
    "jvp": lambda model, x, **options: torch.compile(
        lambda x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1], **options
    )(x),
    "jacrev": lambda model, x, **options: torch.compile(torch.func.jacrev(model), **options)(x[:1]),
    "nested": lambda model, x, **options: torch.compile(model, **options)(
        torch.nested.nested_tensor([x[:3], x], layout=torch.jagged)
    ).values(),
}


@pytest.mark.parametrize("name", COMPILED)
def test_transforms_that_are_compiled(name):
    """As without torch.compile: high precision for that call. The gradient of a compiled `torch.func.grad` was zero."""
    torch._dynamo.reset()
    control, model, _ = pair("current")
    x = torch.randn(8, WIDTH)
    found, wanted = (COMPILED[name](each, x, backend="aot_eager") for each in (model, control))
    assert wanted.any() and torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), control(x)), "FP8 outside of it"
