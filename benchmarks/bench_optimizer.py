"""How long does the optimizer step take? Ours by level, against torch, DeepSpeed's CPUAdam, torchao and bitsandbytes.

    python benchmarks/bench_optimizer.py [--numel 200000000] [--threads 1 2] [--peers]

All contestants start from equal weights; ours must first agree with `reference_step` to the bit on a small partition.
Goals: O2 2.0x torch's fused fp32 AdamW at one thread and 2.2x at two; with stochastic rounding 1.9x; O3, which writes
the FP8 weight besides, 1.8x; 12x torchao, 25x bitsandbytes, 60x the same step in eager PyTorch.
`--peers` adds the slow ones; one that is not installed is noted. The slow ones run on a tenth of the elements: their
time per parameter does not depend on the size.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable

import torch
from harness import Report, Timing, alternate

from ds_fp8.formats import BLOCK_SIZE
from ds_fp8.kernels.adam import AdamStep, WeightCodes, reference_step
from ds_fp8.kernels.cpu.adam import adam_step
from ds_fp8.numerics import masters, states

HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

# name: master, exp_avg, exp_avg_sq, rounding, FP8 weight besides
VARIANTS = {
    "O1 (split32, fp32, fp32)": ("split32", "fp32", "fp32", "nearest", False),
    "O2 (split24, e4m3, fp16)": ("split24", "e4m3", "fp16", "nearest", False),
    "O2 stochastic": ("split24", "e4m3", "fp16", "stochastic", False),
    "O2 fp16 master, stochastic": ("fp16", "e4m3", "fp16", "stochastic", False),
    "O2 expanded": ("split24", "e4m3_expanded", "e4m3_expanded", "nearest", False),
    "O3 (O2 + FP8 weight)": ("split24", "e4m3", "fp16", "nearest", True),
}
O2 = "O2 (split24, e4m3, fp16)"
TORCH = "torch AdamW(fused=True) fp32"


def make_step(numel: int, variant: str) -> AdamStep:
    """A partition in bf16 with bf16 gradients, ten steps old as far as the bias correction is concerned."""
    master, m, v, rounding, fp8_weight = VARIANTS[variant]
    param = torch.empty(numel, dtype=torch.bfloat16).normal_(std=0.02)
    step = AdamStep(
        param=param,
        grad=torch.empty(numel, dtype=torch.bfloat16).normal_(std=1e-3),
        exp_avg=states.new_state(m, numel, "cpu"),
        exp_avg_sq=states.new_state(v, numel, "cpu"),
        master=masters.new_master(master, param),
        lr=HYPER["lr"],
        beta1=HYPER["betas"][0],
        beta2=HYPER["betas"][1],
        eps=HYPER["eps"],
        weight_decay=HYPER["weight_decay"],
        decoupled=True,
        step=10,
        rounding=rounding,
    )
    if fp8_weight:
        middle = numel // 2
        step.weight_codes = WeightCodes(
            codes=torch.zeros(numel, dtype=torch.uint8),
            segments=((0, middle), (middle, numel)),
            scale=torch.tensor([4000.0, 4000.0]),
            amax=torch.zeros(2),
        )
    return step


def bytes_per_parameter(step: AdamStep) -> float:
    """What one pass reads and writes: states, master and weight both ways, the gradient once, codes written."""
    both_ways = [step.param, *step.exp_avg.tensors().values(), *step.exp_avg_sq.tensors().values()]
    both_ways += step.master.tensors().values()
    total = sum(2 * t.numel() * t.element_size() for t in both_ways) + step.grad.numel() * step.grad.element_size()
    return (total + (step.weight_codes.codes.numel() if step.weight_codes else 0)) / step.param.numel()


def assert_bits() -> None:
    """Correctness before speed: two steps of every variant against the reference."""
    for variant in VARIANTS:
        step = make_step(100 * BLOCK_SIZE + 7, variant)
        twin = copy.deepcopy(step)
        for _ in range(2):
            adam_step(step)
            reference_step(twin)
        for mine, expected in zip(step.tensors(), twin.tensors(), strict=True):
            assert torch.equal(mine, expected), f"{variant}: not equal to the reference"


def torch_fused(numel: int) -> Callable[[], object]:
    weight = torch.nn.Parameter(torch.empty(numel).normal_(std=0.02))
    weight.grad = torch.empty(numel).normal_(std=1e-3)
    return torch.optim.AdamW([weight], fused=True, **HYPER).step


def deepspeed_cpu_adam(numel: int) -> Callable[[], object]:
    """Compiled by DeepSpeed at first use; in a folder of its own, so that no lock of another job is met."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp(prefix="bench_extensions_"))
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    weight = torch.nn.Parameter(torch.empty(numel).normal_(std=0.02))
    weight.grad = torch.empty(numel).normal_(std=1e-3)
    return DeepSpeedCPUAdam([weight], adamw_mode=True, **HYPER).step


def torchao_fp8(numel: int) -> Callable[[], object]:
    from torchao.optim import AdamWFp8

    weight = torch.nn.Parameter(torch.empty(numel, dtype=torch.bfloat16).normal_(std=0.02))
    weight.grad = torch.empty_like(weight).normal_(std=1e-3)
    return AdamWFp8([weight], **HYPER).step


def bitsandbytes_8bit(numel: int) -> Callable[[], object]:
    import bitsandbytes

    weight = torch.nn.Parameter(torch.empty(numel).normal_(std=0.02))
    weight.grad = torch.empty_like(weight).normal_(std=1e-3)
    return bitsandbytes.optim.AdamW8bit([weight], **HYPER).step


def eager_o2(numel: int) -> Callable[[], object]:
    step = make_step(numel, O2)
    return lambda: reference_step(step)


PEERS = {
    "torchao AdamWFp8": (torchao_fp8, 12.0),
    "bitsandbytes AdamW8bit": (bitsandbytes_8bit, 25.0),
    "eager O2 in PyTorch": (eager_o2, 60.0),
}


def per_parameter(report: Report, name: str, timing: Timing, numel: int, note: str = "") -> float:
    value = timing.per(numel)
    report.timing(name, f"one step{note}", timing, value=value, unit="ns/parameter")
    return value


def measure(report: Report, arguments: argparse.Namespace, threads: int) -> None:
    """Pairs of torch and one of ours in turn, so that only two sets of buffers are alive at a time."""
    torch.set_num_threads(threads)
    numel = arguments.numel
    ours: dict[str, float] = {}
    fused: dict[str, float] = {}
    for variant in VARIANTS:
        step = make_step(numel, variant)
        contestants = {TORCH: torch_fused(numel), variant: lambda step=step: adam_step(step)}
        timings = alternate(contestants, repeats=arguments.repeats, warmup=1)
        fused[variant] = per_parameter(report, TORCH, timings[TORCH], numel, f", beside {variant}")
        traffic = bytes_per_parameter(step)
        ours[variant] = per_parameter(report, variant, timings[variant], numel, f", {traffic:.1f} bytes")
        del step, contestants
    o2_goal = 2.0 if threads == 1 else 2.2
    for variant, goal in ((O2, o2_goal), ("O2 stochastic", 1.9), ("O3 (O2 + FP8 weight)", 1.8)):
        result = fused[variant] / ours[variant]
        reason = f"{ours[variant]:.2f} ns a parameter; torch moves 28 bytes in {fused[variant]:.2f} ns"
        report.goal(f"{variant} against {TORCH}", result=result, goal=goal, reason=reason)
    if arguments.deepspeed:
        try:
            timing = alternate({"deepspeed": deepspeed_cpu_adam(numel)}, repeats=arguments.repeats, warmup=1)[
                "deepspeed"
            ]
            value = per_parameter(report, "DeepSpeedCPUAdam fp32", timing, numel)
            report.goal(f"{O2} against DeepSpeedCPUAdam", result=value / ours[O2], goal=o2_goal, reason="see above")
        except Exception as error:  # noqa: BLE001 - its own compiler may fail in many ways; the rest still counts
            report.note(f"DeepSpeedCPUAdam could not be built here: {error!r:.200}")
    if arguments.peers:
        measure_peers(report, numel // 10, ours[O2])


def measure_peers(report: Report, numel: int, o2: float) -> None:
    """The slow ones, a few runs each on a tenth of the elements."""
    for name, (make, goal) in PEERS.items():
        try:
            run = make(numel)
            timing = alternate({name: run}, repeats=3, warmup=1)[name]
        except Exception as error:  # noqa: BLE001 - a peer that is missing or fails is a note, not our failure
            report.note(f"{name}: not measured ({error!r:.160})")
            continue
        value = per_parameter(report, name, timing, numel)
        report.goal(f"{O2} against {name}", result=value / o2, goal=goal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=200_000_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="torchao, bitsandbytes and eager PyTorch too")
    parser.add_argument("--deepspeed", action="store_true", help="DeepSpeedCPUAdam too (compiles for minutes)")
    arguments = parser.parse_args()
    assert_bits()
    report = Report("optimizer", "How long does the optimizer step take?")
    for threads in arguments.threads:
        measure(report, arguments, threads)
    report.write()


if __name__ == "__main__":
    main()
