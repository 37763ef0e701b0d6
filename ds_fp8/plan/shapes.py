"""Which modules are one matrix product, and the shape of their matrix, without a look at what class they are of."""

from __future__ import annotations

import torch
from torch import nn


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The whole shape: under `zero.Init` a parameter is empty until gathered, and carries its shape as `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def numel_of(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's layer: a weight [in, out] and `nf` outputs (`transformers.pytorch_utils.Conv1D`), known without transformers."""
    weight = module._parameters.get("weight")
    return (
        type(module).__name__ in ("Conv1D", "Fp8Conv1D")
        and weight is not None
        and len(shape_of(weight)) == 2
        and getattr(module, "nf", None) == shape_of(weight)[1]
    )


def matrix_of(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a Linear, a Conv1D, or a wrapper such as PEFT's around one; None for all else."""
    weight = module._parameters.get("weight")
    if is_conv1d(module):
        columns, rows = shape_of(weight)  # type: ignore[arg-type]  # is_conv1d has looked
        return rows, columns
    if isinstance(module, nn.Linear):
        shape = shape_of(weight) if weight is not None else (module.out_features, module.in_features)
        return shape if len(shape) == 2 else None  # type: ignore[return-value]
    inner = getattr(module, "base_layer", None)
    return matrix_of(inner) if isinstance(inner, nn.Module) else None
