"""How long does the optimizer step take? Ours by level, against torch, DeepSpeed's CPUAdam, torchao and bitsandbytes.

    python benchmarks/bench_optimizer.py [--numel 200000000] [--threads 1 2] [--peers]

All contestants start from equal weights; ours must first agree with `reference_step` to the bit on a small partition.
Goals: O2 2.0x torch's fused fp32 AdamW at one thread and 2.2x at two; with stochastic rounding 1.9x; 12x torchao, 25x
bitsandbytes, 60x the same step in eager PyTorch. `--peers` adds DeepSpeedCPUAdam, which it compiles first, and the slow
ones (`pip install .[bench]`) on a tenth of the elements, with O2 on as many beside them; one that cannot run is a row
with the reason.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Report, Timing, alternate

from ds_fp8.formats import BLOCK_SIZE
from ds_fp8.kernels.adam import AdamStep, reference_step
from ds_fp8.kernels.cpu.adam import adam_step
from ds_fp8.numerics import masters, states

ROOT = Path(__file__).resolve().parent.parent
HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

# name: master, exp_avg, exp_avg_sq, rounding
VARIANTS = {
    "O1 (split32, fp32, fp32)": ("split32", "fp32", "fp32", "nearest"),
    "O2 (split24, int8, fp16)": ("split24", "int8", "fp16", "nearest"),
    "O2 stochastic": ("split24", "int8", "fp16", "stochastic"),
    "O2 with e4m3": ("split24", "e4m3", "fp16", "nearest"),
    "O2 fp16 master, stochastic": ("fp16", "int8", "fp16", "stochastic"),
    "O2 expanded": ("split24", "e4m3_expanded", "e4m3_expanded", "nearest"),
}
O2 = "O2 (split24, int8, fp16)"
TORCH = "torch AdamW(fused=True) fp32"


def make_step(numel: int, variant: str) -> AdamStep:
    """A partition in bf16 with bf16 gradients, ten steps old as far as the bias correction is concerned."""
    master, m, v, rounding = VARIANTS[variant]
    param = torch.empty(numel, dtype=torch.bfloat16).normal_(std=0.02)
    return AdamStep(
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


def bytes_per_parameter(step: AdamStep) -> float:
    """What one pass reads and writes: states, master and weight both ways, the gradient once."""
    both_ways = [step.param, *step.exp_avg.tensors().values(), *step.exp_avg_sq.tensors().values()]
    both_ways += step.master.tensors().values()
    total = sum(2 * t.numel() * t.element_size() for t in both_ways) + step.grad.numel() * step.grad.element_size()
    return total / step.param.numel()


def assert_bits() -> None:
    """Correctness before speed: two steps of every variant against the reference."""
    for variant in VARIANTS:
        step = make_step(100 * BLOCK_SIZE + 7, variant)
        counterpart = copy.deepcopy(step)
        for _ in range(2):
            adam_step(step)
            reference_step(counterpart)
        for mine, expected in zip(step.tensors(), counterpart.tensors(), strict=True):
            assert torch.equal(mine, expected), f"{variant}: not equal to the reference"


def torch_fused(numel: int) -> Callable[[], object]:
    weight = torch.nn.Parameter(torch.empty(numel).normal_(std=0.02))
    weight.grad = torch.empty(numel).normal_(std=1e-3)
    return torch.optim.AdamW([weight], fused=True, **HYPER).step


def deepspeed_cpu_adam(numel: int) -> Callable[[], object]:
    """Compiled by DeepSpeed at first use, a minute or two; into a folder of our own, so that no other job's lock is
    met.
    """
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        folder = ROOT / "runs" / "bench" / "torch_extensions"
        folder.mkdir(parents=True, exist_ok=True)
        for lock in folder.rglob("lock"):
            lock.unlink()  # of a build that was stopped: torch would wait for it for ever
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    weight = torch.nn.Parameter(torch.empty(numel).normal_(std=0.02))
    weight.grad = torch.empty(numel).normal_(std=1e-3)
    return DeepSpeedCPUAdam([weight], adamw_mode=True, **HYPER).step


def torchao_fp8(numel: int) -> Callable[[], object]:
    """Compiled by torch.inductor at the first step. Its states are FP8 only in multiples of 256 elements."""
    from torchao.optim import AdamWFp8

    weight = torch.nn.Parameter(torch.empty(numel, dtype=torch.bfloat16).normal_(std=0.02))
    weight.grad = torch.empty_like(weight).normal_(std=1e-3)
    optimizer = AdamWFp8([weight], **HYPER)
    optimizer.step()
    quantized = getattr(optimizer.state[weight]["exp_avg"], "codes", None)
    assert quantized is not None and quantized.dtype == torch.float8_e4m3fn, "torchao keeps its state in high precision"
    return optimizer.step


def bitsandbytes_8bit(numel: int) -> Callable[[], object]:
    import bitsandbytes

    weight = torch.nn.Parameter(torch.empty(numel).normal_(std=0.02))
    weight.grad = torch.empty_like(weight).normal_(std=1e-3)
    optimizer = bitsandbytes.optim.AdamW8bit([weight], **HYPER)
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8, "bitsandbytes keeps its state in high precision"
    return optimizer.step


def eager_o2(numel: int) -> Callable[[], object]:
    step = make_step(numel, O2)
    return lambda: reference_step(step)


@dataclass(frozen=True)
class Peer:
    """How to make its step, the goal for our O2 at one and at two threads, and the part of the elements it gets."""

    make: Callable[[int], Callable[[], object]]
    goals: tuple[float, float]
    share: float = 0.1


PEERS = {
    "torchao AdamWFp8": Peer(torchao_fp8, (12.0, 12.0)),
    "bitsandbytes AdamW8bit": Peer(bitsandbytes_8bit, (25.0, 25.0)),
    "eager O2 in PyTorch": Peer(eager_o2, (60.0, 60.0)),
    "DeepSpeedCPUAdam fp32": Peer(deepspeed_cpu_adam, (2.0, 2.2), 1.0),
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
    for variant, goal in ((O2, o2_goal), ("O2 stochastic", 1.9)):
        result = fused[variant] / ours[variant]
        reason = f"{ours[variant]:.2f} ns a parameter; torch moves 28 bytes in {fused[variant]:.2f} ns"
        peer = f"{TORCH} {fused[variant]:.2f} ns"
        report.goal(f"{variant} against {TORCH}", result=result, goal=goal, reason=reason, peer=peer)
    if arguments.peers:
        for name, peer in PEERS.items():
            measure_peer(report, name, peer, int(numel * peer.share) // 256 * 256, threads, arguments.repeats)


def measure_peer(report: Report, name: str, peer: Peer, numel: int, threads: int, repeats: int) -> None:
    """One peer and our O2 in turn, over as many elements; one that cannot run is a row with the reason."""
    what, goal = f"{O2} against {name}", peer.goals[min(threads, 2) - 1]
    try:
        run = peer.make(numel)
        step = make_step(numel, O2)
        timings = alternate({name: run, O2: lambda: adam_step(step)}, repeats=repeats, warmup=1)
    except Exception as error:  # noqa: BLE001 - a peer may be missing or fail in any way; the others still count
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        report.goal(what, result=None, goal=goal, reason=f"{type(error).__name__}: {first_line:.200}", peer=name)
        return
    theirs = per_parameter(report, name, timings[name], numel)
    ours = per_parameter(report, O2, timings[O2], numel, f", beside {name}")
    reason = f"{ours:.2f} ns a parameter, {numel / 1e6:.0f}M parameters"
    report.goal(what, result=theirs / ours, goal=goal, reason=reason, peer=f"{name} {theirs:.2f} ns")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=200_000_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peers", action="store_true", help="DeepSpeedCPUAdam, torchao, bitsandbytes, eager PyTorch too"
    )
    arguments = parser.parse_args()
    assert_bits()
    report = Report("optimizer", "How long does the optimizer step take?")
    for threads in arguments.threads:
        measure(report, arguments, threads)
    report.write()


if __name__ == "__main__":
    main()
