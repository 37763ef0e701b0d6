"""DeepSpeed trains from JSON on the device: both backends, stages 0-3, all levels, checkpoints. One rank, NCCL."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

deepspeed = pytest.importorskip("deepspeed")

import ds_fp8  # noqa: E402
from ds_fp8.layers import Fp8Linear  # noqa: E402


class Residual(nn.Module):
    def __init__(self, width: int = 128):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Residual() for _ in range(2)), nn.Linear(128, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return (self.head(x).float() - 1).pow(2).mean()


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A world of one over NCCL, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    deepspeed.init_distributed("nccl")
    ds_fp8.activate()
    yield
    ds_fp8.deactivate()


def make_engine(stage: int, trained: Callable[[Net], Iterable[nn.Parameter]] | None = None, **sections: Any):
    """`trained` says which parameters are not frozen; all of them by default."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    } | sections
    model = Net()
    if trained is not None:
        model.requires_grad_(requires_grad=False)
        for parameter in trained(model):
            parameter.requires_grad_()
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=wanted, config=config)[0]


def train(engine, steps: int = 6, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        loss = engine(torch.randn(32, 128, generator=generator).to(engine.device, torch.bfloat16))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


FP8 = {"enabled": True, "recipe": "delayed", "amax_history_len": 4}


def backends():
    found = ["torch"]
    try:
        import transformer_engine.pytorch  # noqa: F401

        found.append("transformer_engine")
    except (ImportError, RuntimeError, OSError, AssertionError):
        pass
    return found


@pytest.mark.parametrize("backend", backends())
def test_losses_are_equal_over_the_stages(backend):
    """ZeRO only says where things lie: bf16 gradients and fp32 masters give the same numbers in stages 1 to 3.

    Stage 0 is another optimizer of DeepSpeed's, so it is held to its own bf16 run.
    """
    runs = {}
    for stage in (0, 1, 2, 3):
        engine = make_engine(stage, fp8=FP8 | {"backend": backend})
        names = {type(module).__name__ for module in engine.module.modules()}
        assert ("Fp8Linear" if backend == "torch" else "TELinear") in names
        runs[stage] = train(engine)
        engine.destroy()
    assert runs[0] == pytest.approx(train(make_engine(0)), rel=0.1), runs
    for stage in (2, 3):
        assert runs[stage] == pytest.approx(runs[1], rel=2e-2), f"stage {stage}: {runs}"


@pytest.mark.parametrize("recipe", ["current", "block"])
@pytest.mark.parametrize("backend", backends())
def test_other_recipes_train(backend, recipe):
    losses = train(make_engine(2, fp8={"enabled": True, "recipe": recipe, "backend": backend}))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_levels_train_like_bf16(level, stage):
    """Six steps at lr 1e-3: FP8 casts and states stay within a few per cent of DeepSpeed's own losses."""
    baseline = train(make_engine(stage))
    found = train(make_engine(stage, fp8=FP8 | {"backend": "torch"}, msamp={"enabled": True, "opt_level": level}))
    assert found == pytest.approx(baseline, rel=0.05), (found, baseline)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_resume_is_bit_exact(level, tmp_path):
    """Three steps, save, load into a fresh engine, three steps: the losses of six steps in a row."""
    sections = {"fp8": FP8 | {"backend": "torch"}, "msamp": {"enabled": True, "opt_level": level}}
    whole = train(make_engine(2, **sections))
    engine = make_engine(2, **sections)
    train(engine, 3)
    engine.save_checkpoint(str(tmp_path))
    again = make_engine(2, **sections)
    again.load_checkpoint(str(tmp_path))
    assert train(again, 3, first=3) == whole[3:]


def test_layers_are_the_torch_backends_when_asked():
    engine = make_engine(1, fp8=FP8 | {"backend": "torch"})
    assert any(isinstance(module, Fp8Linear) for module in engine.module.modules())
