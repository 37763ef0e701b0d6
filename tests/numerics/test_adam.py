"""The update against torch's own, to the bit, and against its published operations."""

from __future__ import annotations

import pytest
import torch

from ds_fp8.numerics.adam import AdamScalars, ieee_sqrt, torch_sqrt_is_ieee, update

OPTIONS = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("numel", [1, 7, 16, 33, 1000])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.3, 0.9), (0.0, 0.99)])
def test_update_is_torch_to_the_bit(numel, decoupled, betas):
    """Ten steps from zero states, both ways of decay, lerp's two branches (beta1 above and below a half)."""
    generator = torch.Generator().manual_seed(numel)
    weight = torch.randn(numel, generator=generator)
    param = torch.nn.Parameter(weight.clone())
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = cls([param], betas=betas, foreach=False, **OPTIONS)
    m, v = torch.zeros(numel), torch.zeros(numel)
    for step in range(1, 11):
        grad = torch.randn(numel, generator=generator) * torch.exp(torch.randn(numel, generator=generator))
        param.grad = grad.clone()
        reference.step()
        scalars = AdamScalars.at(beta1=betas[0], beta2=betas[1], decoupled=decoupled, step=step, **OPTIONS)
        update(weight, grad, m, v, scalars, torch_sqrt=True)
    state = reference.state[param]
    assert torch.equal(m, state["exp_avg"])
    assert torch.equal(v, state["exp_avg_sq"])
    assert torch.equal(weight, param)


def fma(a, b, c):
    """a * b + c rounded once: the product of two fp32 numbers is exact in fp64, the sum nearly."""
    return (a.double() * b.double() + c.double()).float()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch without fma on this CPU")
def test_the_published_operations_are_torchs():
    """What C++ and Triton implement from the docstring, spelled with single operations, gives torch's bits.

    The fma of this test rounds twice in one case of 2^29; the seed has none.
    """
    generator = torch.Generator().manual_seed(0)
    w, g, m = (torch.randn(1000, generator=generator) for _ in range(3))
    v = torch.rand(1000, generator=generator)
    scalars = AdamScalars.at(beta1=0.9, beta2=0.95, decoupled=False, step=3, **OPTIONS)
    number = {name: torch.tensor(getattr(scalars, name)) for name in scalars.__dataclass_fields__}
    g2 = fma(number["l2"], w, g)
    m2 = fma(number["one_minus_beta1"], g2 - m, m)
    v2 = fma(number["one_minus_beta2"] * g2, g2, v * number["beta2"])
    root = v2.double().sqrt().float()
    w2 = w + (number["step_size"] * m2) / (root / number["bias_correction2_sqrt"] + number["eps"])
    assert torch.equal(update(w, g, m, v, scalars), root)
    for ours, published in ((m, m2), (v, v2), (w, w2)):
        assert torch.equal(ours, published)


def test_ieee_sqrt_is_correctly_rounded():
    """r is the nearest: between the squares of the middles to its neighbours, in fp64 which holds them exactly."""
    x = torch.randint(1, 0x7F800000, (100000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    x = x.view(torch.float32)
    root = ieee_sqrt(x)
    above = torch.nextafter(root, torch.full_like(root, torch.inf)).double()
    below = torch.nextafter(root, torch.zeros_like(root)).double()
    assert (((root.double() + above) / 2) ** 2 >= x.double()).all()
    assert (((root.double() + below) / 2) ** 2 <= x.double()).all()


def test_torch_sqrt_is_asked_not_remembered():
    """Which of the two torch's sqrt is depends on the build and the processor."""
    x = torch.rand(10000, generator=torch.Generator().manual_seed(0))
    if torch_sqrt_is_ieee():
        assert torch.equal(x.sqrt(), ieee_sqrt(x))
    assert (x.sqrt().view(torch.int32) - ieee_sqrt(x).view(torch.int32)).abs().max() <= 1


def test_bias_correction_can_be_left_out():
    scalars = AdamScalars.at(beta1=0.9, beta2=0.95, decoupled=True, step=3, bias_correction=False, **OPTIONS)
    assert (scalars.bias_correction2_sqrt, scalars.step_size) == (1.0, -1e-3)
