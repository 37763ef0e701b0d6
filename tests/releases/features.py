"""What has to work on every release of DeepSpeed: one small job for each feature, two ranks, the plugin as users have
it.

Each function is collective, runs on both ranks and raises AssertionError. Together they call every method of DeepSpeed
that we override (`uncalled` in run.py holds that). O1 keeps fp32 numbers exactly, so there our job must equal
unmodified DeepSpeed's *of the same release* bit for bit: a hook that has changed its meaning shows at once.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from jobs import (
    EXACT,
    FP8,
    FP32_SUMS,
    LEVEL_3,
    OFFLOAD,
    STEPS,
    assert_near,
    configuration,
    exact,
    has_bf16_optimizer,
    is_before,
    masters,
    msamp,
    near,
    run,
    start,
    train,
    weights,
    without_ties,
)
from torch import nn

from ds_fp8.errors import CheckpointError

Feature = Callable[[Path], None]


def alone(folder: Path) -> None:
    """The release by itself, ZeRO 1 to 3 without a section of ours: where this fails, nothing else can be asked."""
    for stage in (1, 2, 3):
        run(configuration(stage), as_released=True)


def fp8_layers(folder: Path) -> None:
    """`fp8` alone in stages 0, 2 and 3, then saved and resumed with its scales."""
    # DeepSpeed before 0.18.6 does not clear the gradients of bf16 jobs in stage 0, so its resumed jobs lack what was in
    # them.
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
    """`msamp` O1 without its wire, stages 1 to 3, bf16, fp16, fp32 and fp32 sums: DeepSpeed's step, bit for bit."""
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
        one, zero = (run(configuration(stage, dtype), **EXACT) for stage in (1, 0))
        # The norm is summed in another order, so it may differ in its last bits, and the clipped gradients with it.
        distance = (zero["weights"] - one["weights"]).abs()
        assert (distance <= 2.0**-7 * one["weights"].abs()).all(), (
            f"{dtype}: a weight differs by more than one rounding"
        )
        assert (distance > 0).float().mean() < 1e-3, f"{dtype}: weights differ from stage 1's"
        for a, b in zip(zero["norms"], one["norms"], strict=True):
            assert abs(a - b) <= 1e-5 * b, f"{dtype}: norms {zero['norms']}, stage 1 {one['norms']}"
    wired = run(configuration(0), **msamp("O2"))
    assert_near(wired, run(configuration(1), **EXACT), "O2")


def o3(folder: Path) -> None:
    """Weights gathered in quantized form compute what 16-bit weights compute: losses of O3 are O2's, digit by digit."""
    for stage, extra in ((1, {}), (2, {}), (3, {}), (2, {"zero": OFFLOAD})):
        config = configuration(stage, **extra)
        two, three = (run(config, **{**msamp(level), "fp8": FP8}) for level in ("O2", "O3"))
        assert three["losses"] == two["losses"], f"stage {stage}: {three['losses']}, O2 has {two['losses']}"
        assert torch.equal(three["weights"], two["weights"]), f"stage {stage}"


def wire_ways(folder: Path) -> None:
    """Every way in which ZeRO 1 and 2 reduce gradients, and stage 3's two."""
    # On a CPU DeepSpeed before 0.19.8 skips this reduction itself, without a word: contiguous gradients are the
    # measure.
    near(2, zero={"contiguous_gradients": False}, baseline={})
    near(2, zero={"contiguous_gradients": False, "overlap_comm": True}, baseline={})
    near(2, zero={"reduce_scatter": False})
    near(1, zero={"use_multi_rank_bucket_allreduce": False})
    near(2, **FP32_SUMS, gas=2)
    near(2, **FP32_SUMS, zero={"contiguous_gradients": False}, baseline={})
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
    """Ours into unmodified DeepSpeed and back, and into ours: at O1 the losses are those of a job that never
    stopped.
    """

    def job(stage: int, saved_by: dict[str, Any], loaded_by: dict[str, Any], seed: int) -> None:
        place = str(folder / f"{stage}-{bool(saved_by)}-{bool(loaded_by)}-{seed}")
        config, ties = configuration(stage), saved_by == loaded_by
        engine = start({**config, **saved_by}, seed=seed)
        train(engine, ties=ties)
        engine.save_checkpoint(place, tag="a")
        expected = train(engine, range(2, 4), ties=ties)
        engine.destroy()
        engine = start({**config, **loaded_by}, seed=seed)
        if stage == 0 and is_before("0.18.5"):
            # DeepSpeed saves no optimizer state of a bf16 job in stage 0 there, so there is nothing to resume from.
            assert_refused(lambda: engine.load_checkpoint(place, tag="a"), "no optimizer state")
        else:
            engine.load_checkpoint(place, tag="a")
            assert train(engine, range(2, 4)) == expected, place
        engine.destroy()

    for stage in (0, 1, 2, 3):
        for saved_by, loaded_by in ((EXACT, {}), ({}, EXACT), (EXACT, EXACT)):
            # DeepSpeed's own stage 0 takes a dry step at construction (`stage_0`).
            if stage > 0 or saved_by == loaded_by:
                without_ties(partial(job, stage, saved_by, loaded_by))


def weights_alone(folder: Path) -> None:
    """`load_module_only` in stages 0 to 2: the weights come, masters are made from them, and training goes on from
    there.
    """
    # In stage 3 DeepSpeed itself loads nothing then, without a word (0.19.8, with and without us).
    for stage, sections in ((0, EXACT), (1, EXACT), (2, EXACT), (2, LEVEL_3)):
        place = str(folder / f"weights-{stage}-{sections['msamp']['opt_level']}")
        config = {**configuration(stage), **sections}
        engine = start(config)
        train(engine)
        engine.save_checkpoint(place, tag="a")
        expected = weights(engine)
        engine.destroy()
        engine = start(config)
        engine.load_checkpoint(place, tag="a", load_module_only=True)
        assert torch.equal(weights(engine), expected), place
        if stage > 0:  # DeepSpeed's fragments need ZeRO
            assert torch.equal(masters(engine), expected), f"{place}: masters of other weights"
        assert all(map(torch.isfinite, map(torch.tensor, train(engine, range(2, 3)))))
        assert not torch.equal(weights(engine), expected), f"{place}: no step was taken"
        engine.destroy()


def universal(folder: Path) -> None:
    """DeepSpeed's own converter reads what we write; stage 2 comes back in stages 2 (O1, O3) and, where DeepSpeed can
    (0.19.3), 3.
    """
    place = folder / "universal"
    # The first engine of stage 3 puts a linear of its own in torch's place, for good: the stages are to compute alike.
    start(configuration(3)).destroy()
    engine = start({**configuration(2), **EXACT})
    train(engine)
    engine.save_checkpoint(str(place), tag="a")
    trained = weights(engine)
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
        assert found == expected, f"into stage {stage}: {found}, never stopped {expected}"
        engine.destroy()
    engine = start({**configuration(2), **LEVEL_3, "checkpoint": {"load_universal": True}})
    engine.load_checkpoint(str(place), tag="u")
    # split24 keeps 8 of the 16 bits below a weight: near the middle between two numbers it may take the other one.
    distance = (weights(engine) - trained).abs()
    assert (distance <= 2.0**-7 * trained.abs()).all(), "into O3: a weight differs by more than one rounding"
    assert (distance > 0).float().mean() < 2.0**-8, "into O3"
    engine.destroy()


def fragments(folder: Path) -> None:
    """The tensor fragment API reads and writes what is kept in quantized form."""
    for stage in (1, 2, 3):
        engine = start({**configuration(stage), **msamp("O2")})
        train(engine)
        for param in engine.module.parameters():
            value = safe_get_full_fp32_param(param)
            assert safe_get_full_optimizer_state(param, "exp_avg_sq").shape == value.shape
            safe_set_full_fp32_param(param, value + 1.0)
            assert (safe_get_full_fp32_param(param) - value - 1.0).abs().max() < 2e-2, f"stage {stage}"
            if stage == 3:
                share = safe_get_local_fp32_param(param)
                safe_set_local_fp32_param(param, share + 1.0)
                assert (safe_get_local_fp32_param(param) - share - 1.0).abs().max() < 2e-2, "a rank's own share"
                assert engine.optimizer.get_hp_param_device(param) == torch.device("cpu")
        train(engine, range(2, 3))
        engine.destroy()


def gathered(folder: Path) -> None:
    """GatheredParameters and save_16bit_model meet whole weights where O3 keeps quantized values."""
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
    "weights alone": weights_alone,
    "universal": universal,
    "fragments": fragments,
    "gathered": gathered,
    "pipeline": pipeline,
}
"""Column of the table -> what it stands for."""
