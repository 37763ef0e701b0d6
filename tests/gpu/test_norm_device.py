"""The norm and the overflow check of a step on the device against DeepSpeed's own, number for number."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("deepspeed")

from ds_fp8.zero.states_norm import FusedGradNormAndOverflow, norms_of


def test_fused_norms_are_the_norms():
    """Accumulated in fp64, as DeepSpeed does it one by one; bf16's largest value squared still fits."""
    gradients = [torch.randn(numel, device="cuda").bfloat16() for numel in (1, 77, 4096, 1_000_003)]
    gradients[1][3] = 3e38
    wanted = torch.stack([torch.linalg.vector_norm(gradient.double()) for gradient in gradients])
    torch.testing.assert_close(norms_of(gradients), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_overflow_is_what_is_not_finite(bad):
    class Step(FusedGradNormAndOverflow):
        def __init__(self, gradients):
            self.averaged_gradients = {0: gradients, 1: None}

    gradients = [torch.ones(1000, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    gradients[2][17] = bad
    assert Step(gradients).has_overflow_partitioned_grads_serial().item() == (bad != 3e38)
