"""Fp8Linear against Transformer Engine on an H200: scales and amax histories bit for bit, products within rounding.

Two sets of golden vectors (their READMEs say how they were recorded): unmodified ones, and odd ones (zero, tiny, huge
and infinite amaxes, gradients that change by 2^20, moving weights, block scaling with short edges).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_fp8.recipe import Recipe
from tests.layers.small_models import columns, golden, swapped

CASES = golden("data/golden/te_linear_steps.pt.xz") + golden("golden/te_linear.pt.xz")
EPS = {"torch.float32": 2.0**-23, "torch.bfloat16": 2.0**-8, "torch.float16": 2.0**-11}
HOPPER_SUM = 2.0**-13
SMALLEST = 2.0**-149  # subnormal sums are rounded at every step


def name_of(case: dict) -> str:
    label = case.get("name") or "-".join([case["kind"], *map(str, case["kw"].values())])
    return f"{label}-{case['dtype'].removeprefix('torch.')}".replace(" ", "_")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equals_transformer_engine(case):
    """The quantized values are the same, so only the order of summation and the rounding of the output may differ."""
    follow(case, "cpu")


def follow(case: dict, device: str) -> None:
    """Our layer on `device` through the steps of one case, each compared with what Transformer Engine left."""
    dtype = getattr(torch, case["dtype"].removeprefix("torch."))
    model = nn.Sequential(nn.Linear(case["w"].shape[1], case["w"].shape[0], dtype=dtype, device=device))
    fp8_state = swapped(model, Recipe(kind=case["kind"], **case["kw"]), weight_cache=False, backend="torch")
    linear = model[0]
    with torch.no_grad():
        linear.weight.copy_(case["w"])
        linear.bias.copy_(case["b"])
    for number, step in enumerate(case["steps"]):
        if "w" in step:
            with torch.no_grad():
                linear.weight.copy_(step["w"])
        x = step["x"].to(device, copy=True).requires_grad_()
        model.zero_grad()
        y = model(x)
        y.backward(step["g"].to(device))
        fp8_state.weights_changed()
        size = [tensor.detach().float().abs().cpu() for tensor in (x, linear.weight, step["g"])]
        compare(y, step["y"], size[0] @ size[1].t(), EPS[case["dtype"]], f"step {number} y")
        compare(x.grad, step["dx"], size[2] @ size[1], EPS[case["dtype"]], f"step {number} dx")
        compare(linear.weight.grad, step["dw"], size[2].t() @ size[0], EPS[case["dtype"]], f"step {number} dw")
        compare(linear.bias.grad, step["db"], size[2].sum(0), EPS[case["dtype"]], f"step {number} db")
        if "scaling_fwd" in step:
            found = {name: tensor.cpu() for name, tensor in columns(fp8_state, "0").items()}
            torch.testing.assert_close(found["forward_scale"], step["scaling_fwd"]["scale"][:2], rtol=0, atol=0)
            torch.testing.assert_close(
                found["forward_history"], step["scaling_fwd"]["amax_history"][:, :2], rtol=0, atol=0
            )
            torch.testing.assert_close(found["backward_scale"], step["scaling_bwd"]["scale"][0], rtol=0, atol=0)
            torch.testing.assert_close(
                found["backward_history"], step["scaling_bwd"]["amax_history"][:, 0], rtol=0, atol=0
            )


def compare(ours: torch.Tensor, theirs: torch.Tensor, size: torch.Tensor, eps: float, where: str) -> None:
    """Non-finite elements in the same places; others within the rounding of both outputs and of Hopper's sum.

    size  sum of the absolute values of all products of an element: no partial sum is larger. Hopper's tensor cores keep
          about 14 bits when they align and add products (DeepSeek-V3, arXiv 2412.19437, 3.3.2): truncated twice.
    """
    limit = torch.finfo(theirs.dtype).max
    ours, theirs = ours.detach().float().cpu(), theirs.float()
    finite = torch.isfinite(theirs)
    # Where partial sums can overflow, infinities depend on the order of summation.
    assert torch.equal(torch.isfinite(ours) | (size > limit), finite | (size > limit)), where
    tolerance = 2 * eps * theirs.abs() + 2 * HOPPER_SUM * size + 8 * SMALLEST
    beyond = ((ours - theirs).abs() - tolerance)[finite & (size <= limit)]
    assert (beyond <= 0).all(), f"{where}: off by {beyond.max():.3g} beyond the tolerance"
