"""Bit-for-bit tests of the fused step: every combination of formats gives the bits of `kernels.adam.reference_step`.

Several steps each, so that a state written wrongly is read again; sizes that are no multiple of 128; nearest and
stochastic, whose bits are a function of seed, step and element and so agree as well.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from ds_fp8.kernels import cpu
from ds_fp8.kernels.adam import AdamStep, reference_step
from ds_fp8.kernels.cpu import loader, torch_sqrt
from ds_fp8.kernels.cpu.adam import adam_step
from ds_fp8.levels import STATES
from ds_fp8.numerics import masters, states

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler on this machine")

EXP_AVG_FORMATS = tuple(name for name, fmt in STATES.items() if fmt.cpp is not None)
EXP_AVG_SQ_FORMATS = tuple(name for name in EXP_AVG_FORMATS if STATES[name].holds_exp_avg_sq)
"""Those that have a kernel here; PyTorch does the step of all others."""

BASES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COMBINATIONS = [(base, master) for base in ("bf16", "fp16") for master in ("fp32", "split32", "split24", "fp16")]
COMBINATIONS.append(("fp32", "split24"))


@pytest.fixture(params=["portable", "avx2", "avx512"])
def path(request):
    """Each path that this CPU has; the best one again afterwards."""
    if loader.choose(request.param) != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    loader.choose("avx512")


def make_step(numel: int, base: str, master: str, m: str, v: str, grad: torch.dtype, **changes) -> AdamStep:
    """A first step on weights N(0, .02); gradients follow in `gradients`."""
    generator = torch.Generator().manual_seed(numel)
    param = torch.randn(numel, generator=generator).mul(0.02).to(BASES[base])
    defaults = {
        "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True, "step": 1,
        "grad_scale": 0.7, "seed": 11,
    }  # fmt: skip
    return AdamStep(
        param=param,
        grad=torch.zeros(numel, dtype=grad),
        exp_avg=states.new_state(m, numel, "cpu"),
        exp_avg_sq=states.new_state(v, numel, "cpu"),
        master=masters.new_master(master, param),
        **(defaults | changes),
    )


def gradients(numel: int, dtype: torch.dtype, step: int) -> torch.Tensor:
    """Heavy-tailed: some blocks with nearly nothing, some with a giant."""
    generator = torch.Generator().manual_seed(1000 * step + numel)
    magnitude = torch.randn(numel, generator=generator).mul(2.0).exp() * 1e-3
    grad = magnitude * torch.randn(numel, generator=generator)
    grad[: numel // 8] = 0.0
    return grad.to(dtype)


def assert_same(left: torch.Tensor, right: torch.Tensor, what: str) -> None:
    """Equal bits; NaN for NaN in floats."""
    if left.is_floating_point():
        left, right = (torch.nan_to_num(x.float(), nan=12345.0, posinf=1e38, neginf=-1e38) for x in (left, right))
        different = left.view(torch.int32) != right.view(torch.int32)
    else:
        different = left != right
    count = int(different.sum())
    first = int(different.nonzero()[0]) if count else -1
    assert count == 0, f"{what}: {count} differ, first at {first}: {left[first]} is not {right[first]}"


def run_both(step: AdamStep, steps: int, *, gradient=gradients) -> None:
    """`steps` steps by C++ and by the reference, on copies; all buffers equal after each."""
    counterpart = copy.deepcopy(step)
    for number in range(1, steps + 1):
        for one in (step, counterpart):
            one.step = number
            one.grad.copy_(gradient(one.param.numel(), one.grad.dtype, number))
        assert adam_step(step) is not NotImplemented
        reference_step(counterpart)
        for position, (mine, expected) in enumerate(zip(step.tensors(), counterpart.tensors(), strict=True)):
            assert_same(mine, expected, f"step {number}, tensor {position}")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("base", "master"), COMBINATIONS)
def test_every_master_and_every_pair_of_states(path, base, master, rounding):
    """30 pairs of states for each master and rounding, three steps, 5 blocks and a tail of 37."""
    for m, v in itertools.product(EXP_AVG_FORMATS, EXP_AVG_SQ_FORMATS):
        run_both(make_step(5 * 128 + 37, base, master, m, v, torch.float32, rounding=rounding), 3)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("master", ["split24", "split32", "fp16"])
@pytest.mark.parametrize("m", ["int8", "e4m3"])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
def test_the_grouped_step_of_o2(path, grad, m, master, rounding):
    """Whole groups of 8 blocks over several chunks, and what is left over; see kernels/cpu/groups.h."""
    run_both(make_step(70 * 128 + 3, "bf16", master, m, "fp16", grad, rounding=rounding), 3)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("m", ["int8", "e4m3"])
def test_the_grouped_step_meets_blocks_of_every_kind(path, m, rounding):
    """It asks each block once whether its roots are zeros or subnormal values: none, some, all; and NaN of either
    sign.
    """

    def mixed(numel, dtype, step):
        grad = gradients(numel, torch.float32, step).view(-1, 128)
        grad[0] = 0  # zero for ever
        grad[1, ::3] = 0
        grad[2] *= torch.logspace(-12, 3, 128)  # wider than fp16's normal numbers
        grad[3] *= torch.logspace(-5, 0, 128)
        grad[4] *= 1e-22  # v below fp32's normal numbers, and some of it zero
        grad[5] *= 1e-37
        if step == 3:
            grad[6] = grad[0]  # the roots stay, the gradient goes
            grad[7, 5] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)  # NaN with a sign
        return grad.view(-1).to(dtype)

    for master in ("split24", "split32", "fp16"):
        for grad in (torch.bfloat16, torch.float32):
            run_both(make_step(16 * 128, "bf16", master, m, "fp16", grad, rounding=rounding), 5, gradient=mixed)


@pytest.mark.parametrize("master", ["split24", "split32"])
@pytest.mark.parametrize("zero", [0.0, -0.0, torch.inf])
def test_a_weight_written_in_place_meets_the_remainder_of_the_old_one(path, master, zero):
    """Pruning sets weights to zero between steps: with a negative remainder beside it a join would be NaN."""
    step = make_step(16 * 128 + 37, "bf16", master, "int8", "fp16", torch.bfloat16)
    run_both(step, 2)
    step.param[::2] = zero
    run_both(step, 1)
    assert not step.param.isnan().any()
    if zero == 0.0:
        assert step.param[::2].abs().max() < 2 * step.lr


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 127, 128, 129, 4096 + 5])
def test_gradient_dtypes_and_sizes(path, grad, numel):
    for m in ("int8", "e4m3"):
        run_both(make_step(numel, "bf16", "split24", m, "fp16", grad), 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoupled": False},
        {"weight_decay": 0.0},
        {"weight_decay": 0.0, "decoupled": False},
        {"bias_correction": False},
        {"beta1": 0.4},
        {"beta1": 0.0, "beta2": 0.0},
        {"eps": 0.0},
        {"lr": 0.0},
        {"grad_scale": torch.tensor(1e-4)},
    ],
    ids=str,
)
def test_hyper_parameters(path, changes):
    """Adam's L2 and AdamW's decay, no correction, momenta on both sides of one half, eps 0."""
    run_both(make_step(1000, "bf16", "split32", "fp32", "fp32", torch.float32, **changes), 4)
    for m in ("int8", "e4m3"):
        run_both(make_step(9 * 128, "bf16", "split24", m, "fp16", torch.bfloat16, **changes), 4)


@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
def test_fp32_states_and_master_are_torch_adam(path, decoupled):
    """O1's promise: with split32 and fp32 states the update is torch's, to the last bit.

    `fused=True`, because torch's unfused Adam takes its square root from MKL, which is one ulp off on some CPUs
    (torch 2.13 on an AMD EPYC: a fifth of the inputs). A multiple of 16 elements, because torch rounds what is left
    over of its vectors in another order than the rest.
    """
    numel = 3072
    step = make_step(numel, "bf16", "split32", "fp32", "fp32", torch.float32, grad_scale=1.0, decoupled=decoupled)
    weight = torch.nn.Parameter(step.param.float())
    optimizer_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = optimizer_class([weight], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for number in range(1, 8):
        step.step = number
        step.grad.copy_(gradients(numel, torch.float32, number))
        weight.grad = step.grad.clone()
        adam_step(step)
        optimizer.step()
        assert_same(masters.read(step.master, step.param), weight.detach(), f"weight, step {number}")
        assert_same(step.exp_avg.data, optimizer.state[weight]["exp_avg"], f"exp_avg, step {number}")
        assert_same(step.exp_avg_sq.data, optimizer.state[weight]["exp_avg_sq"], f"exp_avg_sq, step {number}")


@pytest.mark.skipif(torch_sqrt.entry() is None, reason="torch's square root has no name in this build")
@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
@pytest.mark.parametrize("numel", [3072, 1000 + 3])
def test_with_torchs_own_square_root_they_are_unfused_torch_adam(path, decoupled, numel):
    """torch.optim.Adam as everybody calls it, MKL's root and all: the same bits, tails included."""
    step = make_step(numel, "bf16", "split32", "fp32", "fp32", torch.float32, grad_scale=1.0, decoupled=decoupled)
    step.torch_sqrt = True
    weight = torch.nn.Parameter(step.param.float())
    optimizer_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = optimizer_class([weight], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for number in range(1, 8):
        step.step = number
        step.grad.copy_(gradients(numel, torch.float32, number))
        weight.grad = step.grad.clone()
        assert adam_step(step) is not NotImplemented
        optimizer.step()
        assert_same(masters.read(step.master, step.param), weight.detach(), f"weight, step {number}")
        assert_same(step.exp_avg.data, optimizer.state[weight]["exp_avg"], f"exp_avg, step {number}")
        assert_same(step.exp_avg_sq.data, optimizer.state[weight]["exp_avg_sq"], f"exp_avg_sq, step {number}")


@pytest.mark.skipif(torch_sqrt.entry() is None, reason="torch's square root has no name in this build")
def test_torchs_own_square_root_beside_every_pair_of_states(path):
    """The root that is stored is torch's; the divisor of an 8-bit exp_avg beside fp32 and bf16 stays the rounded
    one.
    """
    for m, v in itertools.product(EXP_AVG_FORMATS, EXP_AVG_SQ_FORMATS):
        run_both(make_step(3 * 128 + 37, "bf16", "split24", m, v, torch.float32, torch_sqrt=True), 3)


def test_not_finite_gradients_stay_visible(path):
    """A NaN or infinity spoils what the reference spoils, no more and no less."""

    def overflowed(numel, dtype, step):
        grad = gradients(numel, dtype, step)
        grad[5], grad[300], grad[700] = float("nan"), float("inf"), -float("inf")
        return grad

    pairs = (("int8", "fp16"), ("e4m3", "fp16"), ("fp32", "bf16"), ("e4m3_expanded", "e4m3_expanded"), ("fp16", "e4m3"))
    for m, v in pairs:
        for base, master in COMBINATIONS:
            run_both(make_step(9 * 128 + 5, base, master, m, v, torch.float32), 2, gradient=overflowed)


def test_tiny_and_huge_moments(path):
    """Gradients of 1e-30 underflow v, those of 1e15 reach 1e30: both as in the reference."""
    for factor in (1e-30, 1e-20, 1e15):
        scaled = lambda numel, dtype, step, by=factor: gradients(numel, dtype, step) * by  # noqa: E731
        for m, v in itertools.product(("int8", "e4m3"), EXP_AVG_SQ_FORMATS):
            run_both(make_step(9 * 128 + 5, "bf16", "split24", m, v, torch.float32), 3, gradient=scaled)


def test_threads_do_not_change_a_bit(path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        step = make_step(128 * 1000 + 3, "bf16", "split24", "int8", "fp16", torch.float32, rounding="stochastic")
        run_both(step, 2)
    finally:
        torch.set_num_threads(before)
