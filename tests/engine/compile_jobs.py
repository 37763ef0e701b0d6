"""Jobs whose model is compiled, beside the same jobs in eager mode."""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.engine_jobs import batch, config, make_engine, steps


def losses(
    rank: int, stage: int, level: str | None, how: str, recipe: str, telemetry: dict[str, Any] | None = None
) -> tuple[list[float], dict[str, int]]:
    """Losses of twelve steps with an evaluation after the tenth; and what torch.compile counted."""
    import ds_fp8

    ds_fp8.activate()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sections: dict[str, Any] = {"fp8": {"enabled": True, "backend": "torch", "recipe": recipe, "start_step": 1}}
    if telemetry is not None:
        sections["fp8"]["telemetry"] = {"enabled": True, **telemetry}
    if level is not None:
        sections["msamp"] = {"enabled": True, "opt_level": level}
    settings = config(stage, gas=2, **sections)
    engine = make_engine(settings)
    if how == "engine.compile":
        engine.compile(backend="aot_eager")
    elif how == "blocks":
        for block in engine.module.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    found = steps(engine, settings, rank, 0, 5)
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    found += steps(engine, settings, rank, 5, 10)
    again, breaks = counters["stats"]["unique_graphs"] - graphs, sum(counters["graph_break"].values())
    engine.module.eval()
    with torch.no_grad():
        found.append(engine.module(batch(rank, 999).bfloat16()).item())
    evaluated = counters["stats"]["unique_graphs"] - graphs - again
    breaks += sum(counters["graph_break"].values())
    engine.module.train()
    found += steps(engine, settings, rank, 10, 12)
    engine.destroy()
    return found, {"graphs": graphs, "recompiled": again, "breaks": breaks, "evaluated": evaluated}


def several(rank: int, world_size: int, calls: list[tuple]) -> list[Any]:
    return [losses(rank, *call) for call in calls]
