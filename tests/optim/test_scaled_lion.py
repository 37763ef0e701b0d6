"""ScaledLion against Lion written out in fp32: to the bit where the formats are fp32, close to it in eight bits."""

from __future__ import annotations

import pytest
import torch

from ds_fp8.errors import CheckpointError
from ds_fp8.levels import LEVELS, STATE_BYTES
from ds_fp8.optim import ScaledAdamW, ScaledLion

LR, BETAS, DECAY = 1e-2, (0.9, 0.99), 0.1
NUMEL = 1000


class PlainLion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675), program 1, on fp32 tensors."""

    def __init__(self, params, lr=LR, betas=BETAS, weight_decay=DECAY):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is not None:
                    m = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    between = (m * beta1).add_(param.grad, alpha=1 - beta1)
                    param.add_(between.sign(), alpha=-group["lr"])
                    m.mul_(beta2).add_(param.grad, alpha=1 - beta2)


def gradients(steps: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(NUMEL, generator=generator)
    return [(torch.randn(NUMEL, generator=generator) + drift).bfloat16() for _ in range(steps)]


def trained(level, grads, dtype=torch.bfloat16, **options):
    param = torch.nn.Parameter(torch.linspace(-2, 2, NUMEL).to(dtype))
    ours = ScaledLion([param], lr=LR, betas=BETAS, weight_decay=DECAY, level=level, **options)
    for grad in grads:
        param.grad = grad.to(dtype)
        ours.step()
    return param, ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_o1_is_lion_to_the_bit(dtype):
    """fp32 state and a master that is fp32, cut in two: 50 steps, every bit of weight and state."""
    grads = gradients(50)
    param, ours = trained("O1", grads, dtype)
    exact = torch.nn.Parameter(torch.linspace(-2, 2, NUMEL).to(dtype).float())
    baseline = PlainLion([exact])
    for grad in grads:
        exact.grad = grad.float()
        baseline.step()
    found = ours.export_fp32(param)
    assert torch.equal(found["master"], exact.detach())
    assert torch.equal(found["exp_avg"], baseline.state[exact]["exp_avg"])
    assert found.keys() == {"step", "master", "exp_avg"}


def test_o2_keeps_one_state_in_int8():
    """The state is int8 and a scale for each block, nothing else; it stays within 4 % of fp32's, and 99 % of all signs
    are its.
    """
    grads = gradients(50)
    param, ours = trained("O2", grads)
    exact, reference = trained("O1", grads)
    state = {key: value for key, value in ours.state[param].items() if isinstance(value, torch.Tensor)}
    assert state.keys() == {"exp_avg.data", "exp_avg.scale_inv", "master.data"}
    assert state["exp_avg.data"].dtype == torch.int8
    moment, wanted = ours.export_fp32(param)["exp_avg"], reference.export_fp32(exact)["exp_avg"]
    assert (moment - wanted).norm() < 0.04 * wanted.norm()
    difference = (ours.export_fp32(param)["master"] - reference.export_fp32(exact)["master"]).abs()
    flips = difference.mean() / (2 * LR * len(grads))
    assert flips < 0.01, "of all signs, those that came out the other way: where momentum and gradient nearly cancel"


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "e4m3", "e4m3_expanded", "int8"])
def test_every_format_holds_the_state_itself(fmt):
    """No second moment, no ratio: what is imported is what is read, within the format's step."""
    param = torch.nn.Parameter(torch.zeros(NUMEL, dtype=torch.bfloat16))
    ours = ScaledLion([param], level=LEVELS["O2"].override(exp_avg=fmt))
    values = torch.randn(NUMEL)
    ours.import_fp32(param, exp_avg=values)
    found = ours.export_fp32(param)["exp_avg"]
    assert ((found - values).abs() <= values.abs() * 2.0**-4 + values.abs().max() / 250).all()
    assert STATE_BYTES[ours.level.exp_avg_sq] == 0


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_resumed_run_goes_on_to_the_bit(level):
    """Stochastic rounding too: its bits depend on seed, partition and step."""
    level = LEVELS[level].override(rounding="stochastic" if level == "O2" else "nearest")
    grads = gradients(12)
    whole, _ = trained(level, grads, seed=7)
    half, ours = trained(level, grads[:6], seed=7)
    again = torch.nn.Parameter(half.detach().clone())
    resumed = ScaledLion([again], level=level, seed=1)
    resumed.load_state_dict(ours.state_dict())
    for grad in grads[6:]:
        again.grad = grad
        resumed.step()
    assert torch.equal(again, whole) and resumed.param_groups[0]["betas"] == BETAS


def test_states_of_another_algorithm_are_refused():
    """Adam's exp_avg means the same, but a Lion that took it would be half a resume; the other way it lacks a state."""
    lion, adam = (cls([torch.nn.Parameter(torch.zeros(256))], level="O2") for cls in (ScaledLion, ScaledAdamW))
    for optimizer in (lion, adam):
        param = optimizer.param_groups[0]["params"][0]
        param.grad = torch.ones_like(param)
        optimizer.step()
    with pytest.raises(CheckpointError, match="it keeps exp_avg and exp_avg_sq, lion keeps exp_avg"):
        lion.load_state_dict(adam.state_dict())
    with pytest.raises(CheckpointError, match="it keeps exp_avg, adamw keeps exp_avg and exp_avg_sq"):
        adam.load_state_dict(lion.state_dict())
    with pytest.raises(CheckpointError, match="exp_avg_sq: no state of lion"):
        lion.import_fp32(param, exp_avg_sq=torch.zeros(256))


def test_nothing_moves_without_a_gradient_and_nan_is_seen():
    """sign(0) is 0; a gradient that is no number reaches the weight, where the loss shows it."""
    param = torch.nn.Parameter(torch.ones(4))
    ours = ScaledLion([param], lr=0.1, level="O1")
    param.grad = torch.tensor([0.0, 1.0, -1.0, float("nan")])
    ours.step()
    assert torch.equal(param[:3], torch.tensor([1.0, 0.9, 1.1])) and param[3].isnan()


def test_numbers_out_of_range_are_refused_by_name():
    for arguments, name in (
        ({"lr": -1.0}, "lr"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]"),
        ({"weight_decay": -1}, "weight_decay"),
    ):
        with pytest.raises(ValueError, match=name):
            ScaledLion([torch.nn.Parameter(torch.zeros(2))], **arguments)
