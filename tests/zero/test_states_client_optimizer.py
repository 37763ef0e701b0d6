"""A client's own Adam, handed to `initialize`: ours in its place, its groups and its scheduler go on working."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from states_jobs import ds_config, full_weights, make_engine, make_plan, train

from ds_fp8.errors import PlanError

pytestmark = pytest.mark.dist


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def two_groups(parameters):
    parameters = list(parameters)
    decay, rest = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 2e-2}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def work(rank: int, world_size: int) -> dict:
    results = {}
    for stage in (0, 1, 2, 3):
        for build in (adam, two_groups):
            weights = []
            for plan in (make_plan("O1", stage=stage), None):
                engine = make_engine(ds_config(stage), plan, optimizer=build)
                train(engine, range(3))
                weights.append(full_weights(engine))
                engine.destroy()
            results[stage, build.__name__] = torch.equal(*weights)
    scheduled = {}

    def with_schedule(parameters):
        scheduled["optimizer"] = adam(parameters)
        scheduled["scheduler"] = torch.optim.lr_scheduler.StepLR(scheduled["optimizer"], 1, gamma=0.5)
        return scheduled["optimizer"]

    engine = make_engine(ds_config(2), make_plan("O2", stage=2), optimizer=with_schedule)
    train(engine, range(1))
    scheduled["scheduler"].step()
    results["lr"] = engine.get_lr()[0]
    engine.destroy()
    try:
        make_engine(ds_config(2), make_plan("O2", stage=2), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        results["refused"] = ""
    except PlanError as error:
        results["refused"] = str(error)
    return results


def test_client_optimizers():
    for of_rank in run_ranks(2, work):
        assert of_rank.pop("lr") == pytest.approx(5e-3)
        assert "SGD" in of_rank.pop("refused")
        for (stage, groups), equal in of_rank.items():
            # Stage 0: DeepSpeed's own wrapper takes a dry step at construction, see test_states_parity.
            assert equal or stage == 0, (stage, groups)
