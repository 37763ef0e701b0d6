"""What has to work on every release of DeepSpeed: one small job for each feature, two ranks, the plugin as users have it.

Each function is collective, runs on both ranks and raises AssertionError. Together they call every method of DeepSpeed
that we override (`uncalled` in run.py holds that). O1 keeps fp32 numbers exactly, so there our job must equal plain
DeepSpeed's *of the same release* bit for bit: a hook that has changed its meaning shows at once.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param
from torch import nn

from ds_fp8.errors import CheckpointError
from ds_fp8.releases import numbers

Feature = Callable[[Path], None]
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


def start(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    # DeepSpeed asks whether the CPU multiplies fp16 *fast*; torch multiplies it everywhere.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    # A copy: DeepSpeed 0.18 takes keys out of what it is given.
    return deepspeed.initialize(model=Net(), config=copy.deepcopy(config))[0]


def train(engine: Any, steps: range = STEPS, *, broken: int | None = None) -> list[float]:
    """Losses of this rank. The loss of step `broken` is infinite."""
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
    return losses


def weights(engine: Any) -> torch.Tensor:
    parts = []
    for param in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([param]):
            parts.append(param.detach().float().reshape(-1).clone())
    return torch.cat(parts)


def run(config: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Train a job to its end: losses, weights, reported norm, skipped steps."""
    broken = sections.pop("broken", None)
    engine = start({**config, **sections})
    result = {"losses": train(engine, broken=broken), "weights": weights(engine)}
    result |= {"norm": float(engine.get_global_grad_norm() or 0.0), "skipped": engine.skipped_steps}
    engine.destroy()
    return result


def is_before(release: str) -> bool:
    return numbers(deepspeed.__version__) < numbers(release)


def has_bf16_optimizer() -> bool:
    """Before 0.18.5 two of DeepSpeed's constants are equal, and where it means BF16_Optimizer it takes a wrapper of stage 0.

    Ours trains there as stage 0 does; DeepSpeed's starts at step 2 and scales the loss by 2^16, so it is no measure.
    """
    return not is_before("0.18.5")


def msamp(level: str, **keys: Any) -> dict[str, Any]:
    """The sections of a job without FP8 products."""
    return {"msamp": {"enabled": True, "opt_level": level, **keys}, "fp8": {"enabled": False}}


EXACT = msamp("O1", gradient_wire="none")


def exact(stage: int, dtype: str = "bf16", **extra: Any) -> None:
    """O1 without the wire is DeepSpeed's own step, bit for bit."""
    config = configuration(stage, dtype, **extra)
    ours, plain = run(config, **EXACT), run(config)
    # Our Adam and torch's may part in the last bit of an fp32 master; of thousands of weights a few then round otherwise.
    distance, size = (ours["weights"] - plain["weights"]).abs(), plain["weights"].abs()
    assert (distance > 0).float().mean() < 1e-3, f"stage {stage} {dtype}: weights differ from DeepSpeed's"
    assert (distance <= 2**-7 * size + 2**-24).all(), f"stage {stage} {dtype}: a weight differs by more than a rounding"
    assert ours["losses"] == plain["losses"]
    assert ours["norm"] == plain["norm"], f"stage {stage} {dtype}: norm {ours['norm']}, DeepSpeed's {plain['norm']}"


def assert_near(ours: torch.Tensor, plain: torch.Tensor, where: str) -> None:
    """Two updates of at most lr = 1e-2 each. An early Adam update is the sign of its gradient, so single ones may turn."""
    distance = (ours - plain).abs()
    assert distance.max() < 5e-2, f"{where}: weights differ by up to {distance.max():.1e}"
    assert distance.mean() < 1.5e-3, f"{where}: weights differ by {distance.mean():.1e} on the mean"


def near(stage: int, level: str = "O2", dtype: str = "bf16", *, tolerance: float = 0.05, **extra: Any) -> None:
    """With coded states and gradients the job stays by DeepSpeed's, on all ranks alike."""
    other = extra.pop("plain", None)
    measure = extra if other is None else {**extra, "zero": other}
    config = configuration(stage, dtype, **extra)
    ours, plain = run(config, **msamp(level)), run(configuration(stage, dtype, **measure))
    assert_near(ours["weights"], plain["weights"], f"stage {stage}")
    assert abs(ours["norm"] - plain["norm"]) < tolerance * plain["norm"], f"norm {ours['norm']} beside {plain['norm']}"
    lowest, highest = ours["weights"].clone(), ours["weights"].clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    assert torch.equal(lowest, highest), f"stage {stage}: ranks have different weights"


def alone(folder: Path) -> None:
    """The release by itself, ZeRO 1 to 3 without a section of ours: where this fails, nothing else can be asked."""
    for stage in (1, 2, 3):
        run(configuration(stage))


def fp8_layers(folder: Path) -> None:
    """`fp8` alone in stages 0, 2 and 3, then saved and resumed with its scales."""
    # DeepSpeed before 0.18.6 does not clear the gradients of bf16 jobs in stage 0, so its resumed jobs lack what was in them.
    for stage in (2, 3) if is_before("0.18.6") else (0, 2, 3):
        config = {**configuration(stage), "fp8": FP8}
        engine = start(config)
        before = train(engine)
        assert all(map(torch.isfinite, map(torch.tensor, before)))
        engine.save_checkpoint(str(folder / f"fp8-{stage}"), tag="a")
        after = train(engine, range(2, 4))
        engine.destroy()
        engine = start(config)
        engine.load_checkpoint(str(folder / f"fp8-{stage}"), tag="a")
        assert train(engine, range(2, 4)) == after, f"stage {stage}: a resumed job goes elsewhere"
        engine.destroy()


def o1(folder: Path) -> None:
    """`msamp` O1 without its wire, stages 1 to 3, bf16, fp16, fp32 and fp32 sums: DeepSpeed's step, fewer than one weight in 1000 off by one rounding."""
    for stage in (1, 2, 3):
        exact(stage, gas=2)
        exact(stage, "fp16")
    exact(0, "fp32")
    exact(2, **FP32_SUMS, gas=2)
    exact(3, **FP32_SUMS, gas=2)
    if has_bf16_optimizer():
        exact(1, **FP32_SUMS)
    exact(2, zero={"round_robin_gradients": True})


def offload(folder: Path) -> None:
    """The same with the optimizer on the host."""
    for stage in (1, 2, 3):
        exact(stage, gas=2, zero=OFFLOAD)


def o2(folder: Path) -> None:
    """`msamp` O2 and O1 with gradients in FP8, stages 1 to 3: near DeepSpeed's weights, equal on all ranks."""
    for stage in (1, 2, 3):
        near(stage)
        near(stage, "O1", gas=2)
    if has_bf16_optimizer():
        near(1, **FP32_SUMS)


def stage_0(folder: Path) -> None:
    """DeepSpeed's own 16-bit wrappers start at step 2 there, so stage 1 is the measure."""
    for dtype in ("bf16", "fp16"):
        one = run(configuration(1, dtype), **EXACT)
        zero = run(configuration(0, dtype), **EXACT)
        assert_near(zero["weights"], one["weights"], dtype)
        assert abs(zero["norm"] - one["norm"]) < 1e-2 * one["norm"], f"{dtype}: {zero['norm']}, stage 1 {one['norm']}"
    wired = run(configuration(0), **msamp("O2"))
    assert_near(wired["weights"], run(configuration(1), **EXACT)["weights"], "O2")


def o3(folder: Path) -> None:
    """Weights gathered as codes compute what 16-bit weights compute: losses of O3 are O2's, digit by digit."""
    for stage, extra in ((1, {}), (2, {}), (3, {}), (2, {"zero": OFFLOAD})):
        config = configuration(stage, **extra)
        two, three = (run(config, **{**msamp(level), "fp8": FP8}) for level in ("O2", "O3"))
        assert three["losses"] == two["losses"], f"stage {stage}: {three['losses']}, O2 has {two['losses']}"
        assert torch.equal(three["weights"], two["weights"]), f"stage {stage}"


def wire_ways(folder: Path) -> None:
    """Every way in which ZeRO 1 and 2 reduce gradients, and stage 3's two."""
    # On a CPU DeepSpeed before 0.19.8 skips this reduction itself, without a word: contiguous gradients are the measure.
    near(2, zero={"contiguous_gradients": False}, plain={})
    near(2, zero={"contiguous_gradients": False, "overlap_comm": True}, plain={})
    near(2, zero={"reduce_scatter": False})
    near(1, zero={"use_multi_rank_bucket_allreduce": False})
    near(2, **FP32_SUMS, gas=2)
    near(3, zero={"reduce_scatter": False})


def overflow(folder: Path) -> None:
    """An infinite loss skips one step, in every stage."""
    for stage in (0, 1, 2, 3):
        result = run(configuration(stage, "fp16"), **msamp("O2"), broken=0)
        assert result["skipped"] == 1, f"stage {stage}: {result['skipped']} steps skipped"
        assert result["weights"].isfinite().all(), f"stage {stage}"


def assert_refused(load: Callable[[], Any], reason: str) -> None:
    try:
        load()
    except CheckpointError as error:
        assert reason in str(error), error
    else:
        raise AssertionError("a checkpoint without optimizer state was loaded in silence")


def checkpoints(folder: Path) -> None:
    """Ours into plain DeepSpeed and back, and into ours: at O1 the losses are those of a job that never stopped."""
    for stage in (0, 1, 2, 3):
        for saved_by, loaded_by in ((EXACT, {}), ({}, EXACT), (EXACT, EXACT)):
            if stage == 0 and not (saved_by and loaded_by):
                continue  # DeepSpeed's own stage 0 takes a dry step at construction (`stage_0`)
            place = str(folder / f"{stage}-{bool(saved_by)}-{bool(loaded_by)}")
            config = configuration(stage)
            engine = start({**config, **saved_by})
            train(engine)
            engine.save_checkpoint(place, tag="a")
            expected = train(engine, range(2, 4))
            engine.destroy()
            engine = start({**config, **loaded_by})
            if stage == 0 and is_before("0.18.5"):
                # DeepSpeed saves no optimizer state of a bf16 job in stage 0 there, so there is nothing to resume from.
                assert_refused(lambda: engine.load_checkpoint(place, tag="a"), "no optimizer state")  # noqa: B023
                engine.destroy()
                continue
            engine.load_checkpoint(place, tag="a")
            assert train(engine, range(2, 4)) == expected, place
            engine.destroy()


def universal(folder: Path) -> None:
    """DeepSpeed's own converter reads what we write; stage 2 comes back in stages 2 and (where DeepSpeed can, from 0.19.3) 3."""
    place = folder / "universal"
    engine = start({**configuration(2), **EXACT})
    train(engine)
    engine.save_checkpoint(str(place), tag="a")
    expected = train(engine, range(2, 4))
    engine.destroy()
    if dist.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal

        sys.argv = ["ds_to_universal", "--input_folder", str(place / "a"), "--output_folder", str(place / "u")]
        sys.argv += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
        arguments = ds_to_universal.parse_arguments()
        ds_to_universal.main(arguments)
    dist.barrier()
    for stage in (2,) if is_before("0.19.3") else (2, 3):
        config = {**configuration(stage), **EXACT, "checkpoint": {"load_universal": True}}
        engine = start(config)
        engine.load_checkpoint(str(place), tag="u")
        found = train(engine, range(2, 4))
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5, f"into stage {stage}"
        engine.destroy()


def fragments(folder: Path) -> None:
    """The tensor fragment API reads and writes what is kept in codes."""
    for stage in (1, 2, 3):
        engine = start({**configuration(stage), **msamp("O2")})
        train(engine)
        for param in engine.module.parameters():
            value = safe_get_full_fp32_param(param)
            assert safe_get_full_optimizer_state(param, "exp_avg_sq").shape == value.shape
            safe_set_full_fp32_param(param, value + 1.0)
            assert (safe_get_full_fp32_param(param) - value - 1.0).abs().max() < 2e-2, f"stage {stage}"
        train(engine, range(2, 3))
        engine.destroy()


def gathered(folder: Path) -> None:
    """GatheredParameters and save_16bit_model meet whole weights where O3 keeps codes."""
    for stage in (2, 3):
        extra = {"zero": {"stage3_gather_16bit_weights_on_model_save": True}}
        engine = start({**configuration(stage, **extra), **msamp("O3"), "fp8": FP8})
        train(engine)
        param = engine.module.up.weight
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            assert param.isfinite().all()
            if dist.get_rank() == 0:
                param.data.mul_(0.5)
        found = weights(engine)
        engine.save_16bit_model(str(folder / f"16bit-{stage}"))
        if dist.get_rank() == 0:
            saved = torch.load(folder / f"16bit-{stage}" / "pytorch_model.bin", weights_only=True)
            assert saved["up.weight"].isfinite().all()
            assert torch.equal(
                torch.cat([saved[n].float().reshape(-1) for n, _ in engine.module.named_parameters()]), found
            )
        train(engine, range(2, 3))
        engine.destroy()


def pipeline(folder: Path) -> None:
    """Two pipeline stages on two ranks, with DeepSpeed's BF16_Optimizer (stage 0) and with ZeRO 1."""
    from deepspeed.pipe import LayerSpec, PipelineModule

    def losses(stage: int, sections: dict[str, Any]) -> list[float]:
        torch.manual_seed(0)
        layers = [LayerSpec(nn.Linear, 16, 32), nn.ReLU(), LayerSpec(nn.Linear, 32, 16)]
        model = PipelineModule(layers, num_stages=2, loss_fn=lambda out, y: (out - y).float().pow(2).mean())
        engine = deepspeed.initialize(model=model, config=copy.deepcopy({**configuration(stage, gas=2), **sections}))[0]
        found = []
        for step in STEPS:
            draw = torch.Generator().manual_seed(step)
            pairs = [tuple(torch.randn(4, 16, generator=draw).bfloat16() for _ in "xy") for _ in range(2)]
            found.append(float(engine.train_batch(data_iter=iter(pairs))))
        engine.destroy()
        return found

    for stage in (0, 1) if has_bf16_optimizer() else (1,):
        assert losses(stage, EXACT) == losses(stage, {}), f"stage {stage}"


FEATURES: dict[str, Feature] = {
    "DeepSpeed alone": alone,
    "fp8 layers": fp8_layers,
    "O1": o1,
    "stage 0": stage_0,
    "O2": o2,
    "O3": o3,
    "offload": offload,
    "wire": wire_ways,
    "overflow": overflow,
    "checkpoints": checkpoints,
    "universal": universal,
    "fragments": fragments,
    "gathered": gathered,
    "pipeline": pipeline,
}
"""Column of the table -> what it stands for."""
