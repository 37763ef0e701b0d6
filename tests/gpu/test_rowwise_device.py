"""Recipe `rowwise` on the device: `torch._scaled_mm` with a scale per row against the same operands decoded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_fp8.layers import gemm
from ds_fp8.recipe import Recipe
from tests.layers.small_models import swapped

pytestmark = pytest.mark.gpu


def passes(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch, *, decoded: bool) -> list[torch.Tensor]:
    """Output, gradients, of one layer."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 768, bias=bias).to("cuda", torch.bfloat16)
    model = nn.Sequential(layer)
    fp8_state = swapped(model, Recipe(kind="rowwise"), backend="torch")
    fp8_state.layer_states[0].fast_step = 0 if decoded else None
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(rows, 512, generator=generator, device="cuda").bfloat16()
    x = (x * torch.logspace(-3, 3, rows, device="cuda").unsqueeze(1)).bfloat16().requires_grad_()  # rows of any size
    gradient = (torch.randn(rows, 768, generator=generator, device="cuda") * 1e-3).bfloat16()
    with monkeypatch.context() as patch:
        if decoded:
            patch.setattr(gemm, "multiplies_rows", lambda device: False)
        output = model(x)
        output.backward(gradient)
    assert bool(fp8_state.layer_states[0].fast_step) != decoded
    return [output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", [256, 37], ids=["whole", "padded"])
def test_products_by_rows_are_those_of_decoded_operands(rows, bias, monkeypatch):
    """Equal operands and scales; sums in another order, and fast accumulation in fprop (some 14 bits): 2^-6 of a row's
    typical value.
    """
    assert gemm.multiplies_rows(torch.device("cuda", 0)), "Hopper or later"
    found = passes(rows, bias, monkeypatch, decoded=False)
    wanted = passes(rows, bias, monkeypatch, decoded=True)
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        scale = other.float().pow(2).mean(-1, keepdim=True).sqrt() if other.dim() > 1 else other.float().abs().max()
        worst = ((one.float() - other.float()).abs() / (scale + other.float().abs())).max()
        assert worst < 2**-6, f"tensor {number}: {worst}"


def test_training_goes_on_by_rows():
    losses = []
    for kind in (None, "rowwise"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to("cuda", torch.bfloat16)
        fp8_state = None if kind is None else swapped(model, Recipe(kind=kind), backend="torch")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        x = torch.randn(256, 256, device="cuda").bfloat16()
        for _ in range(30):
            loss = (model(x) - x.roll(1, 1)).float().pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if fp8_state is not None:
                fp8_state.weights_changed()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
