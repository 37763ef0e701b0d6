"""Files of a checkpoint for tools that have no engine: with torch, and without running what a pickle holds."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError


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
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds objects that loading would have to run: {str(error).strip().splitlines()[-1]}\n"
            "  `--trust-pickle` loads them all the same; only for files whose writer you know."
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}).") from error
