"""Which modules are one matrix product, and the shape of their matrix.

`LAYER_TYPES` are the layers of libraries that multiply by one weight by code of their own. They are known by their
structure, so that no library has to be installed; an entry is all that another type of layer needs (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The whole shape: under `zero.Init` a parameter is empty until gathered, and carries its shape as `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def numel_of(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@dataclass(frozen=True)
class LayerType:
    """A class of layers whose forward is x @ weight.T + bias (or x @ weight), for x [..., in] and one bias [out] or
    None.

    fits        of a module with this class name and a two-dimensional Parameter `weight`: whether it is such a layer
    transposed  the weight lies as [in, out], and not as [out, in]
    """

    fits: Callable[[nn.Module], bool]
    transposed: bool = False


LAYER_TYPES = {
    # GPT-2's layer with `nf` outputs (transformers.pytorch_utils).
    "Conv1D": LayerType(lambda layer: getattr(layer, "nf", None) == weight_shape(layer)[1], transposed=True),
    # Falcon's nn.Linear, whose forward multiplies and adds the bias in two steps (transformers.models.falcon).
    "FalconLinear": LayerType(
        lambda layer: any(cls.__module__.endswith(".modeling_falcon") for cls in type(layer).__mro__)
    ),
}
"""By the name of their class, which is the kind that plans and messages call them by."""

DENSE = ("Linear", *LAYER_TYPES)
"""Kinds that multiply by one weight."""


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The Parameter of that name that the module itself holds; of TorchScript's modules, too, whose containers are no
    dicts.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else None  # noqa: SIM401


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of `weight`; () without one."""
    weight = own_parameter(module, "weight")
    return () if weight is None else shape_of(weight)


def layer_type(module: nn.Module) -> str | None:
    """Which of `LAYER_TYPES` a module is, converted or not."""
    name = type(module).__name__.removeprefix("Fp8")
    known = LAYER_TYPES.get(name)
    return name if known is not None and len(weight_shape(module)) == 2 and known.fits(module) else None


def matrix_of(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a Linear, one of `LAYER_TYPES`, or a wrapper such as PEFT's around one; None
    for all else.
    """
    if (kind := layer_type(module)) is not None:
        first, second = weight_shape(module)
        return (second, first) if LAYER_TYPES[kind].transposed else (first, second)
    if isinstance(module, nn.Linear):
        shape = weight_shape(module) or (module.out_features, module.in_features)
        return shape if len(shape) == 2 else None  # type: ignore[return-value]
    inner = getattr(module, "base_layer", None)
    return matrix_of(inner) if isinstance(inner, nn.Module) else None


def is_around_another(module: nn.Module) -> bool:
    """An nn.Linear without a weight, around the one that multiplies: PEFT's RandLoRA."""
    own = own_parameter(module, "weight")
    return isinstance(module, nn.Linear) and own is None and isinstance(module._modules.get("base_layer"), nn.Module)
