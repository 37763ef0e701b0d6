"""Small jobs on two ranks, and how ours is measured by DeepSpeed's: equal, or as near as 8 bits allow.

`exact` is for O1 without its wire, which keeps fp32 numbers: DeepSpeed's step, bit for bit. `near` is for quantized
states and gradients; its bounds are derived, not tuned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from ds_fp8.releases import faults, numbers

STEPS = range(2)
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
FP8 = {"enabled": True, "amax_history_len": 4}


class Net(nn.Module):
    """FP8 layers of sizes that fit, between parameters of odd sizes, so that partitions end anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(21, 32)
        self.up = nn.Linear(32, 144)
        self.norm = nn.LayerNorm(144)
        self.down = nn.Linear(144, 48, bias=False)
        self.head = nn.Linear(48, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.down(self.norm(torch.relu(self.up(self.table(tokens)))))))


def configuration(stage: int, dtype: str = "bf16", gas: int = 1, **extra: Any) -> dict[str, Any]:
    """DeepSpeed's JSON; `zero` adds to zero_optimization, everything else to the top level."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, **extra.pop("zero", {})}
    params = {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": "AdamW", "params": params},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **extra,
    }
    if dtype != "fp32":
        found[dtype] = {
            "enabled": True,
            **({"initial_scale_power": 8} if dtype == "fp16" else {}),
            **found.get(dtype, {}),
        }
    return found


@contextmanager
def mended() -> Iterator[None]:
    """What DeepSpeed 0.18.7 to 0.18.9 do wrong by themselves (`releases.FAULTS`), put right as 0.19.0 does it."""
    original = DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned
    if faults(deepspeed.__version__):
        DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned = lambda self, *args, **kwargs: original(
            self, *args, **kwargs
        ).detach()
    try:
        yield
    finally:
        DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned = original


def start(config: dict[str, Any], *, seed: int = 0, as_released: bool = False) -> Any:
    torch.manual_seed(seed)
    # DeepSpeed asks whether the CPU multiplies fp16 *fast*; torch multiplies it everywhere.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    with nullcontext() if as_released else mended():
        # A copy: DeepSpeed 0.18 takes keys out of what it is given.
        return deepspeed.initialize(model=Net(), config=copy.deepcopy(config))[0]


def masters(engine: Any) -> torch.Tensor:
    return torch.cat([safe_get_full_fp32_param(param).reshape(-1) for param in engine.module.parameters()])


class TieError(Exception):
    """A master lies midway between two bf16 numbers."""


def refuse_ties(engine: Any) -> None:
    """Raise TieError where our 16-bit weight is not DeepSpeed's, though the fp32 masters are equal.

    Midway between two bf16 numbers DeepSpeed takes the even one and split32 the upper one (docs/numerics.md): one
    weight in 131072, so every tenth step of this net has one, and then the two jobs part.
    """
    if ((masters(engine).view(torch.int32) & 0x1FFFF) == 0x8000).any():
        engine.destroy()
        raise TieError


def without_ties(job: Callable[[int], None]) -> None:
    """Call job(seed) with the first seed of the weights for which it meets no tie."""
    for seed in range(20):
        try:
            return job(seed)
        except TieError:
            continue
    raise AssertionError("ties in 20 jobs of 20")


def train(engine: Any, steps: range = STEPS, *, broken: int | None = None, ties: bool = True) -> list[float]:
    """Losses of this rank. The loss of step `broken` is infinite. Without `ties` one ends the job (`without_ties`)."""
    losses = []
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            draw = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
            tokens, targets = (
                torch.randint(0, 21, (4, 16), generator=draw),
                torch.randint(0, 7, (4, 16), generator=draw),
            )
            loss = nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), targets.flatten())
            engine.backward(loss * float("inf") if step == broken else loss)
            engine.step()
            losses.append(loss.item())
        if not ties:
            refuse_ties(engine)
    return losses


def weights(engine: Any) -> torch.Tensor:
    parts = []
    for param in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([param]):
            parts.append(param.detach().float().reshape(-1).clone())
    return torch.cat(parts)


def run(config: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Train a job to its end: losses, reported norms, weights, skipped steps."""
    broken, ties = sections.pop("broken", None), sections.pop("ties", True)
    how = {key: sections.pop(key) for key in ("seed", "as_released") if key in sections}
    engine = start({**config, **sections}, **how)
    losses, norms = [], []
    for step in STEPS:
        losses += train(engine, range(step, step + 1), broken=broken, ties=ties)
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    result = {"losses": losses, "norms": norms, "weights": weights(engine), "skipped": engine.skipped_steps}
    engine.destroy()
    return result


def is_before(release: str) -> bool:
    return numbers(deepspeed.__version__) < numbers(release)


def has_bf16_optimizer() -> bool:
    """Before 0.18.5 two of DeepSpeed's constants are equal, and where it means BF16_Optimizer it takes a wrapper of
    stage 0.

    Ours trains there as stage 0 does; DeepSpeed's starts at step 2 and scales the loss by 2^16, so it is no measure.
    """
    return not is_before("0.18.5")


def msamp(level: str, **keys: Any) -> dict[str, Any]:
    """The sections of a job without FP8 products."""
    return {"msamp": {"enabled": True, "opt_level": level, **keys}, "fp8": {"enabled": False}}


EXACT = msamp("O1", gradient_wire="none")
LEVEL_3 = {**msamp("O3"), "fp8": FP8}


def exact(stage: int, dtype: str = "bf16", **extra: Any) -> None:
    """O1 without the wire is DeepSpeed's own step, bit for bit."""
    config = configuration(stage, dtype, **extra)

    def job(seed: int) -> None:
        baseline = run(config, seed=seed, ties=dtype != "bf16")
        ours = run(config, seed=seed, **EXACT)
        assert torch.equal(ours["weights"], baseline["weights"]), (
            f"stage {stage} {dtype}: weights differ from DeepSpeed's"
        )
        assert ours["losses"] == baseline["losses"]
        assert ours["norms"] == baseline["norms"], (
            f"stage {stage} {dtype}: {ours['norms']}, DeepSpeed's {baseline['norms']}"
        )

    without_ties(job)


def assert_near(ours: dict[str, Any], baseline: dict[str, Any], where: str) -> None:
    """Weights and the first gradient norm, within what 8 bits cost in two steps.

    An early update of Adam is lr times the sign of the gradient, whatever its size. So where the gradients of two ranks
    nearly cancel, their rounding to e4m3 (half a unit: 2^-4 of each) turns an update: two steps part by at most 4 lr,
    one turned step by 2 lr, and all others hardly. The norm after the first backward is of the same weights: 2^-4 at
    most, of random sign in thousands of elements.
    """
    distance, lr = (ours["weights"] - baseline["weights"]).abs(), 1e-2
    rounding = 2.0**-8 * baseline["weights"].abs()
    assert (distance <= 4 * lr + rounding).all(), f"{where}: weights differ by up to {distance.max():.1e}"
    turned = (distance > lr / 2).float().mean()
    assert turned < 0.05, f"{where}: {turned:.1%} of the weights went another way"
    ratio = ours["norms"][0] / baseline["norms"][0]
    assert abs(ratio - 1) < 2.0**-7, f"{where}: norm {ours['norms'][0]}, DeepSpeed's {baseline['norms'][0]}"


def near(stage: int, level: str = "O2", dtype: str = "bf16", **extra: Any) -> None:
    """With quantized states and gradients the job stays by DeepSpeed's, on all ranks alike."""
    other = extra.pop("baseline", None)
    measure = extra if other is None else {**extra, "zero": other}
    config = configuration(stage, dtype, **extra)
    ours, baseline = run(config, **msamp(level)), run(configuration(stage, dtype, **measure))
    assert_near(ours, baseline, f"stage {stage} {level}")
    lowest, highest = ours["weights"].clone(), ours["weights"].clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    assert torch.equal(lowest, highest), f"stage {stage}: ranks have different weights"
