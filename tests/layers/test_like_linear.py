"""An FP8 layer in the hands of an unmodified script: what works with nn.Linear works here, to FP8's rounding, or says
why not.

Beside each case stands the control, the same model with nn.Linear. The rounding of one layer: two operands with 3 bits
of mantissa, so a relative error of the whole result below 2^-4 in each of two layers (2^-4 is one operand's largest
single error; over a sum errors average out).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from ds_fp8.errors import LayerError
from ds_fp8.layers import restore_layers
from ds_fp8.recipe import Recipe
from tests.layers.small_models import swapped

KINDS = ["delayed", "current", "block"]
ROUNDING = 2 * 2.0**-4
WIDTH = 64


def pair(kind: str, dtype: torch.dtype = torch.float32, **fp8: Any) -> tuple[nn.Module, nn.Module, Any]:
    """The control, the same model in FP8 as an engine holds it, and its FP8 state."""
    torch.manual_seed(0)
    control = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).to(dtype)
    model = copy.deepcopy(control)
    return control, model, swapped(model, Recipe(kind=kind), managed=True, backend="torch", **fp8)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().float().norm() / wanted.detach().float().norm())


def zero_slice(y: torch.Tensor) -> torch.Tensor:
    y[..., 0] = 0
    return y


def zero_rows(y: torch.Tensor) -> torch.Tensor:
    y[torch.arange(len(y)) % 2 == 0] = 0
    return y


def fill_row(y: torch.Tensor) -> torch.Tensor:
    y[0].fill_(0)
    return y


def halves(y: torch.Tensor) -> torch.Tensor:
    left, right = y[..., : WIDTH // 2], y[..., WIDTH // 2 :]
    left.mul_(2)
    right.add_(1)
    return y


WRITES = {
    "slice": zero_slice,
    "mask": zero_rows,
    "row": fill_row,
    "halves": halves,
    "masked_fill_": lambda y: y.masked_fill_(torch.eye(WIDTH, dtype=torch.bool)[: y.shape[-2]], 0),
    "mul_": lambda y: y.mul_(2),
    "tanh_": lambda y: y.tanh_(),
    "transpose": lambda y: y.transpose(0, -1).mul_(2).transpose(0, -1),
    "chunk": lambda y: y.chunk(2, -1)[0].mul_(2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("write", WRITES)
def test_an_output_may_be_written_into(write, dims, kind):
    """The output and the model's output, with hooks on both; where torch refuses, it refuses the control too."""

    class Writes(nn.Module):
        hooks = True

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            h = self.first(x)
            if self.hooks:
                h.register_hook(lambda gradient: None)
            return WRITES[write](self.last(WRITES[write](h) if write != "chunk" else h))

    torch.manual_seed(0)
    control = Writes()
    model = copy.deepcopy(control)
    control.hooks = False  # torch 2.13: nn.Linear's own output ends in a segmentation fault (3-D, slice write, hook)
    swapped(model, Recipe(kind=kind), managed=True)
    x = torch.randn(16, WIDTH) if dims == 2 else torch.randn(2, 16, WIDTH)
    results = []
    for each in (control, model):
        given = x.clone().requires_grad_()
        try:
            y = each(given)
        except RuntimeError as found:
            results.append(str(found)[:40])
            continue
        if each.hooks:
            y.register_hook(lambda gradient: None)
        (y * 2).sum().backward()
        results.append((y, given.grad, each.first.weight.grad))
    if isinstance(results[0], str):
        assert results[0] == results[1]
        return
    for wanted, found in zip(*results, strict=True):
        assert error(found, wanted) < ROUNDING


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_change_unseen(kind, cache):
    """Writes that bump no version, new memory, given weights, an average swapped in: the product has today's weight."""
    control, model, fp8_state = pair(kind, weight_cache=cache)
    fp8_state.optimized = frozenset(map(id, model.parameters()))
    x = torch.randn(16, WIDTH)

    def compare(what: str) -> None:
        with torch.no_grad():
            assert error(model(x), control(x)) < ROUNDING, what

    def both(change: Any) -> None:
        for each in (control, model):
            for parameter in each.parameters():
                change(parameter)

    for step in range(2):
        model(x).sum().backward()
        fp8_state.update_scales()
        fp8_state.weights_changed()
        compare(f"step {step}")
        # Smaller, because under delayed scaling a weight that outgrows its history saturates until the next step.
        both(lambda p: p.data.div_(3))
        compare("p.data.div_")
        both(lambda p: setattr(p, "data", p.data * 3))
        compare("p.data = other")
        kept = [parameter.data.clone() for parameter in model.parameters()]
        both(lambda p: p.data.zero_())
        with torch.no_grad():
            assert not model(x).any(), "averages of zero, swapped in"
        for each in (control, model):
            for parameter, value in zip(each.parameters(), kept, strict=True):
                parameter.data.copy_(value)
        compare("and out")
        for factor in (1, 0.2, 0.5):  # fresh tensors, perhaps at the address of the last ones
            given = {name: value.detach() * factor for name, value in control.named_parameters()}
            found, wanted = (torch.func.functional_call(each, given, (x,)) for each in (model, control))
            assert error(found, wanted) < ROUNDING, f"functional_call {factor}"
            del given


@pytest.mark.parametrize("kind", KINDS)
def test_a_momentum_branch_is_read_as_it_stands(kind):
    """BYOL, MoCo, DINO: a frozen copy that the forward itself moves in every micro-batch, with a cache asked for."""
    control, model, fp8_state = pair(kind, weight_cache=True)
    fp8_state.optimized = frozenset(map(id, model[0].parameters()))
    x = torch.randn(16, WIDTH)
    for _ in range(4):
        results = []
        for each in (control, model):
            with torch.no_grad():
                each[2].weight.data.mul_(1.5)
            results.append(each(x))
        assert error(results[1], results[0]) < ROUNDING
        results[1].sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_torch_func(kind):
    """vmap, grad, jvp, jacrev and forward-mode derivatives: high precision for that call, so the control's bits."""
    control, model, _ = pair(kind)
    x = torch.randn(8, WIDTH)

    def loss_of(each: nn.Module):
        def loss(weights, one):
            return torch.func.functional_call(each, weights, (one,)).pow(2).sum()

        return loss

    for transform in (
        lambda each: torch.func.vmap(each)(x),
        lambda each: torch.func.grad(loss_of(each))(dict(each.named_parameters()), x)["0.weight"],
        lambda each: torch.func.vmap(torch.func.grad(loss_of(each)), (None, 0))(dict(each.named_parameters()), x)[
            "0.weight"
        ],
        lambda each: torch.func.jvp(each, (x,), (torch.ones_like(x),))[1],
        lambda each: torch.func.jacrev(each)(x[0]),
    ):  # fmt: skip
        assert torch.allclose(transform(model), transform(control), rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level():
        found = [
            forward_ad.unpack_dual(each(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
            for each in (model, control)
        ]
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(layout):
    """Sequences of several lengths: what nn.Linear gives, with gradients."""
    control, model, _ = pair("delayed")
    rows = [torch.randn(length, WIDTH) for length in (3, 7)]
    results = []
    for each in (control, model):
        y = each[0](torch.nested.nested_tensor(rows, layout=layout))
        (y.values() if layout == torch.jagged else torch.nested.to_padded_tensor(y, 0.0)).sum().backward()
        results.append((*y.unbind(), each[0].weight.grad))
    for wanted, found in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_tensor_subclass():
    class Marked(torch.Tensor):
        pass

    control, model, _ = pair("current")
    x = torch.randn(16, WIDTH).as_subclass(Marked)
    assert type(model(x)) is Marked and torch.equal(model(x), control(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 1e-6, 30.0])
def test_a_teacher_that_never_records(kind, scale):
    """Copied before the first step, run in train mode under no_grad only: no history ever tells its scales."""
    control, model, _ = pair(kind)
    for each in (control, model):
        with torch.no_grad():
            each[0].weight.mul_(scale)
            each[0].bias.zero_()
    teacher, baseline = copy.deepcopy(model)[0], control[0]
    x = torch.randn(16, WIDTH) * scale
    for _ in range(3):
        with torch.no_grad():
            assert error(teacher(x), baseline(x)) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_a_root_that_is_a_linear(kind):
    """Nothing around the layer: forward, backward, in-place write."""
    torch.manual_seed(0)
    control = nn.Linear(WIDTH, WIDTH)
    model = copy.deepcopy(control)
    swapped(model, Recipe(kind=kind))
    x = torch.randn(4, 8, WIDTH)
    results = []
    for each in (control, model):
        for _ in range(2):  # the first call of a layer without an engine has scale 1, as Transformer Engine's
            each.zero_grad()
            zero_slice(each(x)).sum().backward()
        results.append(each.weight.grad)
    assert error(results[1], results[0]) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_ours_are_runtime_errors(kind):
    """`except RuntimeError`, as scripts write for shapes and dtypes, catches ours; they name the layer."""
    _, model, _ = pair(kind)
    for wrong in (torch.randn(16, WIDTH + 1), torch.randn(16, WIDTH).double()):
        with pytest.raises(RuntimeError, match=r"^0: input") as found:
            model(wrong)
        assert isinstance(found.value, LayerError)
    for nothing in (None, "text", [1.0] * WIDTH):
        with pytest.raises(TypeError, match="must be Tensor"):  # torch's own words
            model(nothing)
    x = torch.randn(16, WIDTH, requires_grad=True)
    with pytest.raises(RuntimeError, match="fp8/layers/exclude"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_tools_that_read_the_class(kind):
    """torch.jit traces the layer in high precision and scripts an unmodified copy; torch.fx leaves one call, which
    stays in FP8.
    """
    control, model, _ = pair(kind)
    x = torch.randn(16, WIDTH)
    assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), control(x))
    with pytest.raises(LayerError, match="restore_layers"):
        torch.jit.script(model)
    assert torch.equal(torch.jit.script(restore_layers(copy.deepcopy(model)))(x), control(x))
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes].count("call_module") == len(model)
    assert torch.equal(graph(x), model(x)) and not torch.equal(graph(x), control(x))
    restore_layers(model)
    assert all(type(layer).__module__ == layer.__module__ for layer in model)


@pytest.mark.parametrize("kind", KINDS)
def test_another_parameter_in_the_weights_place(kind):
    """Its range has nothing to do with the history of the one that was there."""
    control, model, fp8_state = pair(kind)
    x = torch.randn(16, WIDTH)
    model(x).sum().backward()
    fp8_state.update_scales()
    for factor in (100.0, 0.01):
        other = torch.nn.Parameter(control[0].weight.detach() * factor)
        for each in (control, model):
            each[0].weight = other
        with torch.no_grad():
            assert error(model[0](x), control[0](x)) < ROUNDING
