"""The module of a model file is refused where `load_state_dict` would refuse it, and only there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ds_fp8.checkpoint.module import check_module
from ds_fp8.errors import CheckpointError


class Queue(nn.Module):
    """As a momentum queue: a buffer that grows while it trains, and takes the size of the file."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("rows", torch.zeros(rows, 4))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.rows = torch.zeros_like(state_dict[prefix + "rows"])
        super()._load_from_state_dict(state_dict, prefix, *args)


def forgiving() -> nn.Module:
    """Whatever is missing in a file stays as it is."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    return model


def loads(model: nn.Module, saved: dict[str, torch.Tensor]) -> bool:
    try:
        copy.deepcopy(model).load_state_dict(saved, strict=True)
    except RuntimeError:
        return False
    return True


def passes(model: nn.Module, saved: dict[str, torch.Tensor]) -> bool:
    try:
        check_module(model, saved, "file")
    except CheckpointError:
        return False
    return True


def without_first(model: nn.Module) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    del state[next(iter(state))]
    return state


@pytest.mark.parametrize(
    ("model", "saved"),
    [
        (Queue(2), Queue(6).state_dict()),
        (nn.Sequential(Queue(2), nn.Linear(4, 4)), nn.Sequential(Queue(6), nn.Linear(4, 4)).state_dict()),
        (forgiving(), without_first(forgiving())),
        (nn.BatchNorm1d(4), nn.BatchNorm1d(4).state_dict()),
        (nn.BatchNorm1d(4), nn.BatchNorm1d(5).state_dict()),
        (nn.Linear(4, 4), without_first(nn.Linear(4, 4))),
        (nn.Linear(4, 4), nn.Linear(5, 4).state_dict()),
        (nn.Sequential(Queue(2), nn.Linear(4, 4)), nn.Sequential(Queue(6), nn.Linear(5, 4)).state_dict()),
    ],
    ids=["queue", "queue inside", "forgiving", "norm", "other norm", "name missing", "other shape", "shape beside"],
)
def test_a_file_passes_where_torch_would_load_it(model, saved):
    assert passes(model, saved) == loads(model, saved)
