"""Files of a checkpoint, read to the host: by an engine, by torch alone, or without running what a pickle holds."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..zero.touched import touched
from .records import check_records

FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""torch's variables; the two together are an error there."""

TOUCHED = {
    "CheckpointEngine": touched(reads="load"),
    "Engine": touched(reads="checkpoint_engine"),
}


def read_by_engine(engine: Any, path: str) -> Any:
    """A file as `engine` (a DeepSpeedEngine) would load it; CheckpointError if a record is damaged or it cannot be
    read.
    """
    check_records(path)
    try:
        return engine.checkpoint_engine.load(path, map_location="cpu")
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). Truncated or no checkpoint; use an older tag."
        ) from error


def read_tensors(path: str | Path) -> Any:
    """A file on the host, by torch, for tools that have no engine; CheckpointError if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}).") from error


def read_safe(path: str | Path) -> Any:
    """`read_tensors` of a file that runs nothing: tensors, built-in values and DeepSpeed's own small classes.

    CheckpointError for any other object: a pickle may do whatever its writer liked.
    """
    try:
        with nothing_is_run():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds objects that loading would have to run: {str(error).strip().splitlines()[-1]}\n"
            "  `--trust-pickle` loads them all the same; only for files whose writer you know."
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}).") from error


@contextmanager
def nothing_is_run() -> Iterator[None]:
    """Every torch.load of this process reads with `weights_only`, DeepSpeed's own readers too: a file that was judged
    may have been exchanged since.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    there = torch.serialization.get_safe_globals()
    # Those of a caller stay: the context takes away what it is given.
    new = [one for one in known if one not in there]
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(new):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
