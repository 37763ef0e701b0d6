"""The module's part of a model file against the module that will take it: names and shapes, before anything is
loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from torch import nn

from ..errors import CheckpointError
from ..zero.touched import touched
from .values import holds_values

TOUCHED = {"Parameter": touched(reads="ds_shape")}


def check_module(module: nn.Module, saved: Any, where: str) -> None:
    """Raise CheckpointError if `load_state_dict(saved, strict=True)` could not succeed, or would take whole numbers for
    fractions: weights as int32 are all zeros and ones.

    saved  name -> tensor, as `module.state_dict()` gives it
    Shapes are compared where a name is in both, and no module above it has hooks or overrides, which may change sizes
    (a queue that grows). Names and kinds of numbers are compared only if every module loads as nn.Module does: another
    may rename, and quantize.
    """
    if not isinstance(saved, dict):
        raise CheckpointError(f"{where}: the module is a {type(saved).__name__}, expected names and tensors.")
    expected = dict(_shapes(module))
    rewritten = tuple(f"{prefix}." if prefix else "" for prefix, one in module.named_modules() if _may_rewrite(one))
    for name, shapes in expected.items():
        tensor = saved.get(name)
        if name in saved and not holds_values(tensor):
            raise CheckpointError(f"{where}: {name} is a {type(tensor).__name__} without values; it is damaged.")
        if name.startswith(rewritten):
            continue
        if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) not in shapes:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, this model's has {shapes[-1]}: another model."
            )
    if not all(_loads_as_usual(one) for one in module.modules()):
        return
    own = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in saved.items():
        if name in own and isinstance(tensor, torch.Tensor) and _kind(tensor) != _kind(own[name]):
            raise CheckpointError(
                f"{where}: {name} is {tensor.dtype}, this model's is {own[name].dtype}: numbers of another kind; it is "
                "damaged."
            )
    elsewhere = set(_experts(module))  # each expert in a file of its own, taken out of the module's
    missing, extra = sorted(expected.keys() - saved.keys() - elsewhere), sorted(saved.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{where}: another model: {_few(missing)} missing in the file, {_few(extra)} not in this model.\n"
            "  Load it with load_module_strict=False if that is meant."
        )


def _kind(tensor: torch.Tensor) -> str:
    """Whole numbers and flags are one kind: masks were bytes once."""
    return "complex" if tensor.is_complex() else "floating point" if tensor.is_floating_point() else "whole numbers"


def _shapes(module: nn.Module) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
    """Name and shapes of all that a state dict holds, without reading a value.

    A parameter that ZeRO-3 has cut up stands there as it lies, empty, or whole where it is kept so.
    """
    for name, parameter in module.named_parameters(remove_duplicate=False):
        shapes = (tuple(parameter.shape), tuple(getattr(parameter, "ds_shape", parameter.shape)))
        yield name, (((0,), *shapes) if hasattr(parameter, "ds_shape") else shapes)
    for prefix, one in module.named_modules(remove_duplicate=False):
        for name, buffer in one._buffers.items():
            if buffer is not None and name not in one._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, (tuple(buffer.shape),)


def _experts(module: nn.Module) -> Iterator[str]:
    """What belongs to the experts of DeepSpeed's MoE layers, which its checkpoints keep apart."""
    prefixes = {name.rpartition(".")[0] for name, one in module.named_parameters() if is_moe_param(one)}
    for name, _ in _shapes(module):
        if name.rpartition(".")[0] in prefixes:
            yield name


def _loads_as_usual(module: nn.Module) -> bool:
    """Whether names in the file are the module's. A hook that runs after a load may forgive what is missing."""
    return (
        not _may_rewrite(module, torch_too=True)
        and type(module).get_extra_state is nn.Module.get_extra_state
        and not module._load_state_dict_post_hooks
        and not hasattr(module, "parametrizations")
    )


def _may_rewrite(module: nn.Module, *, torch_too: bool = False) -> bool:
    """Whether its own code comes between the file and its tensors.

    torch_too  torch's own layers count, too (BatchNorm adds a name to old files)
    """
    for name in ("_load_from_state_dict", "load_state_dict", "state_dict", "_save_to_state_dict"):
        method = getattr(type(module), name)
        if method is not getattr(nn.Module, name) and (torch_too or not method.__module__.startswith("torch.nn.")):
            return True
    hooks = (module._load_state_dict_pre_hooks, module._state_dict_hooks, module._state_dict_pre_hooks)
    return any(not _is_ours(hook) for one in hooks for hook in one.values())


def _is_ours(hook: Any) -> bool:
    """O3's hooks decode weights and rename nothing; torch wraps those that want the module."""
    return type(getattr(hook, "hook", hook)).__module__.startswith("ds_fp8.")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"
