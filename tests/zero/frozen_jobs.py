"""Weights that a script writes in place or freezes in the middle of a run, under DeepSpeed alone and at every level."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from tests.engine.engine_jobs import full_weights, make_engine, steps


def frozen_in_mid_run(rank: int, world_size: int, settings: dict[str, Any]) -> dict[str, Any]:
    """How far a layer moves in the steps after it was frozen, and its last move before."""
    import ds_fp8

    ds_fp8.activate()
    with contextlib.redirect_stdout(io.StringIO()):
        engine = make_engine(settings)
        moved = []
        for step in range(5):
            before = full_weights(engine)["blocks.0.up.weight"]
            if step == 3:
                engine.module.blocks[0].up.requires_grad_(False)
            steps(engine, settings, rank, step, step + 1)
            moved.append((full_weights(engine)["blocks.0.up.weight"] - before).abs().mean().item())
    return {"moved": moved}


def written_in_place(rank: int, world_size: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Half of a weight is set to zero on every rank; what it is after the next step."""
    import ds_fp8

    ds_fp8.activate()
    with contextlib.redirect_stdout(io.StringIO()):
        engine = make_engine(settings)
        steps(engine, settings, rank, 0, 3)
        weight = engine.module.blocks[0].up.weight
        with torch.no_grad():
            weight.data[:32] = 0
        losses = steps(engine, settings, rank, 3, 5)
        after = full_weights(engine)["blocks.0.up.weight"]
    return {"zeroed": after[:32].abs().mean().item(), "others": after[32:].abs().mean().item(), "losses": losses}


def several(rank: int, world_size: int, calls: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    return [globals()[name](rank, world_size, *arguments) for name, arguments in calls]
