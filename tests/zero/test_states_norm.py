"""One norm for all gradients instead of one for each: the same number, and DeepSpeed's own path where it counts apart.

Only a GPU takes the fused path; here the question "is it a GPU" is answered with yes, the arithmetic is the same.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import states_jobs
import torch
from ranks import run_ranks

from ds_fp8.zero import states_norm
from ds_fp8.zero.states_norm import FusedGradNorm, FusedGradNormAndOverflow


def norms(rank: int, world_size: int) -> dict[int, list[list[float]]]:
    """Reported norms of four steps by stage, DeepSpeed's path and ours; one step skips."""
    asked = states_norm.on_gpu
    found: dict[int, list[list[float]]] = {}
    for stage in (1, 2, 3):
        for on_gpu in (asked, bool):
            states_norm.on_gpu = on_gpu
            run = states_jobs.run_case({"stage": stage, "level": "O2"}, True, overflow_at=2)
            assert run["skipped"] == 1
            found.setdefault(stage, []).append(run["norms"])
    states_norm.on_gpu = asked
    return found


@pytest.mark.dist
def test_the_norm_and_the_skipped_step_are_deepspeeds():
    for of_rank in run_ranks(2, norms):
        for stage, (theirs, ours) in of_rank.items():
            assert ours == pytest.approx(theirs, rel=1e-6), stage


class Theirs:
    """DeepSpeed's method: keeps what it was asked."""

    def get_grad_norm_direct(self, gradients, params, norm_type=2):
        self.asked = len(gradients), len(params)
        return "theirs"


class Ours(FusedGradNorm, Theirs):
    pass


@pytest.mark.parametrize("mark", ["ds_pipe_replicated", "model_parallel", "tensor_model_parallel"])
def test_parameters_that_count_on_one_rank_only_are_left_to_deepspeed(monkeypatch, mark):
    """With tensor parallelism some gradients are added on rank 0 alone: one norm of all would count them on every
    rank.
    """
    monkeypatch.setattr(states_norm, "on_gpu", bool)
    gradients = [torch.ones(3), torch.ones(4)]
    step = Ours()
    step.get_grad_norm_direct(gradients, [SimpleNamespace(), SimpleNamespace(**{mark: True})])
    assert step.asked == (2, 2)
    step.get_grad_norm_direct(gradients, [SimpleNamespace(), SimpleNamespace(**{mark: False})])
    assert step.asked == (1, 1)
    step.get_grad_norm_direct(gradients, [SimpleNamespace()] * 2, float("inf"))
    assert step.asked == (2, 2)


def test_on_a_cpu_everything_stays_deepspeeds():
    step = Ours()
    assert step.get_grad_norm_direct([torch.ones(3)] * 2, [SimpleNamespace()] * 2) == "theirs"
    assert step.asked == (2, 2)
    assert issubclass(FusedGradNormAndOverflow, FusedGradNorm)
