"""Stacked experts on the device: torch's grouped product of FP8 rows against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.layers.test_grouped_products import COUNTS, RECIPES


def passes(recipe: str, counts: list[int], extra: int, device: str) -> list[torch.Tensor]:
    from ds_fp8.layers.grouped_products import GroupedProducts
    from ds_fp8.layers.groups import Groups

    torch.manual_seed(1)
    rows, experts = sum(counts) + extra, len(counts)
    x = torch.randn(rows, 256).bfloat16().to(device).requires_grad_()
    weight = torch.randn(experts, 384, 256).bfloat16().to(device).requires_grad_()
    gradient = torch.randn(rows, 384).bfloat16().to(device)
    groups = Groups(torch.tensor(counts, device=device), rows)
    output = GroupedProducts.apply(x, weight, groups, RECIPES[recipe], False, True)
    output.backward(gradient)
    return [output.detach().float().cpu(), x.grad.float().cpu(), weight.grad.float().cpu()]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("recipe", ["current", "block", "some"])
def test_the_device_computes_what_the_reference_does(recipe, counts):
    """The same quantized values and scales; the sums may be in another order and, in fprop, in fewer bits."""
    extra = 6 if counts == "rows of nobody" else 0
    expected = passes(recipe, COUNTS[counts], extra, "cpu")
    for ours, reference in zip(passes(recipe, COUNTS[counts], extra, "cuda"), expected, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours - reference).norm() <= 2**-7 * reference.norm()
