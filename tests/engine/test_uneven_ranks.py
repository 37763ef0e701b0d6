"""Ranks that run different numbers of forwards: all that DeepSpeed does alone is done with FP8 layers, without a hang.

No forward and no backward communicates for FP8's sake; both ranks come to the engine's step, and their scales are equal
there. One launch for all cases; a hang is a gloo timeout.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from tests.engine.engine_jobs import config, make_engine

pytestmark = pytest.mark.dist
WIDTH = 64
STEPS = 3
FOLDER: dict[str, str] = {}
"""In a rank: where it saves."""


class Towers(nn.Module):
    """A dual encoder, trained through its submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.text = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.image(x) - self.text(x)


def even(engine: Any, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    return engine(x)


def rank_0_evaluates(engine: Any, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """In eval and in train mode, under no_grad; the other one waits. In the first micro-batch of each step, too."""
    if rank == 0:
        with torch.no_grad():
            engine.eval()
            engine.module(x)
            engine.train()
            engine.module(100 * x)
    torch.distributed.barrier()
    return engine(x)


def a_rank_has_no_validation_batch(engine: Any, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """Rank 0 validates on two batches, rank 1 on one, and nobody waits for anybody."""
    engine.eval()
    with torch.no_grad():
        for _ in range(2 - rank):
            engine(x)
    engine.train()
    return engine(x)


def text_runs_twice(engine: Any, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    text = engine.module.text(x)
    if rank == 0:
        text = text + engine.module.text(x.flip(0))
    return engine.module.image(x) - text


def image_on_one_rank(engine: Any, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """The other one's image tower has no amax in this step, and takes that of the first."""
    image = engine.module.image(x) if rank == 0 else 0 * sum(p.sum() for p in engine.module.image.parameters())
    return image - engine.module.text(x)


def a_batch_is_dropped(engine: Any, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """One rank runs a forward whose result it throws away."""
    if rank == 1:
        engine(3 * x)
    return engine(x)


def saved_in_between(engine: Any, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """All save, in the middle of gradient accumulation, after rank 0 has run one forward more."""
    if step == 3:
        if rank == 0:
            with torch.no_grad():
                engine.module(x)
        engine.save_checkpoint(FOLDER["checkpoints"])
    return engine(x)


CASES = [
    even,
    rank_0_evaluates,
    a_rank_has_no_validation_batch,
    text_runs_twice,
    image_on_one_rank,
    a_batch_is_dropped,
    saved_in_between,
]

STAGE_3 = [even, a_rank_has_no_validation_batch, saved_in_between]
"""What ZeRO-3 does alone: in the others its ranks gather different parameters, and it hangs without us."""

O2 = {"fp8": {"enabled": True}, "msamp": {"enabled": True, "opt_level": "O2"}}
O3 = {"fp8": {"enabled": True}, "msamp": {"enabled": True, "opt_level": "O3"}}


def train(rank: int, case: Any, stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    import deepspeed

    import ds_fp8.engine

    torch.manual_seed(0)
    model = Towers()
    with contextlib.redirect_stdout(io.StringIO()):
        engine = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config(stage, gas=2, **sections)
        )[0]
    losses = []
    for step in range(2 * STEPS):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(16, WIDTH, generator=generator).to(engine.device, torch.bfloat16)
        loss = case(engine, x, rank, step).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    attachment = ds_fp8.engine.of(engine)
    fp8_state = None if attachment is None else attachment.fp8_state
    found = {"losses": losses, "scales": None if fp8_state is None else fp8_state.scales.clone()}
    found["updates"] = None if fp8_state is None else fp8_state.forward.updates
    engine.destroy()
    return found


def skipped(rank: int, stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    """fp16: rank 0 alone overflows in the second step, which all skip."""
    import ds_fp8.engine

    settings = config(stage, "fp16", **sections)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = make_engine(settings, Towers())
    losses = []
    for step in range(4):
        x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank)).to(
            engine.device, torch.half
        )
        loss = engine(x).float().pow(2).mean()
        engine.backward(loss * 1e38 if step == 1 and rank == 0 else loss)
        engine.step()
        losses.append(loss.item())
    attachment = ds_fp8.engine.of(engine)
    fp8_state = None if attachment is None else attachment.fp8_state
    found = {
        "losses": losses,
        "skipped": engine.skipped_steps,
        "updates": None if fp8_state is None else fp8_state.forward.updates,
    }
    found["scales"] = None if fp8_state is None else fp8_state.scales.clone()
    engine.destroy()
    return found


def job(rank: int, world_size: int, folder: str) -> dict[Any, Any]:
    import ds_fp8

    ds_fp8.activate()
    FOLDER["checkpoints"] = folder
    found = {}
    for stage in (0, 1, 2, 3):
        for case in STAGE_3 if stage == 3 else CASES:
            modes = {"control": {}, **({"O3": O3} if stage else {})}
            if stage != 1:
                modes["delayed"] = {"fp8": {"enabled": True}}
            if stage == 2 and case in (rank_0_evaluates, text_runs_twice):
                modes |= {kind: {"fp8": {"enabled": True, "recipe": kind}} for kind in ("current", "block")} | {
                    "O2": O2
                }
            for mode, sections in modes.items():
                found[case.__name__, stage, mode] = train(rank, case, stage, sections)
    for stage in (1, 2):  # DeepSpeed's stage 0 does not scale an fp16 loss, and is refused
        for mode, sections in {"control": {}, "delayed": {"fp8": {"enabled": True}}, "O3": O3}.items():
            found["skipped", stage, mode] = skipped(rank, stage, sections)
    return found


def chosen(rank: int, world_size: int, cases: list[Any], stages: Any, modes: dict[str, Any]) -> dict[Any, Any]:
    """Some cases in some modes, for other devices."""
    import ds_fp8

    ds_fp8.activate()
    return {
        (case.__name__, stage, mode): train(rank, case, stage, sections)
        for stage in stages
        for case in cases
        for mode, sections in modes.items()
        # DeepSpeed 0.19.8's own stage 0 moves less in its first step on a GPU than its other stages, to which levels
        # are held.
        if stage or mode in ("control", "delayed")
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[Any, Any]]:
    return run_ranks(2, job, str(tmp_path_factory.mktemp("saved")), timeout_s=290)


def judge(found: list[dict[Any, Any]]) -> None:
    """Losses within FP8's rounding of the control's; scales equal on both ranks, and moved once per step."""
    for rank in found:
        for (case, stage, mode), each in rank.items():
            control = rank[case, stage, "control"]["losses"]
            assert each["losses"] == pytest.approx(control, rel=2.0**-4), (case, stage, mode)
            assert each.get("skipped") == (1 if case == "skipped" else None)
    for key, each in found[0].items():
        if key[2] in ("delayed", "O2", "O3"):
            assert torch.equal(each["scales"], found[1][key]["scales"]), key
            assert each["updates"] == (4 if key[0] == "skipped" else STEPS) and (each["scales"] != 1).all(), key


def test_every_case_trains_as_deepspeed_does_alone(found):
    """And scales move once per step, also in a step that is skipped."""
    judge(found)
