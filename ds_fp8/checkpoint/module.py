"""The module's part of a model file against the module that will take it: names and shapes, before anything is
loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..zero.touched import touched

TOUCHED = {"Parameter": touched(reads="ds_shape")}


def check_module(module: nn.Module, saved: Any, where: str) -> None:
    """Raise CheckpointError if `load_state_dict(saved, strict=True)` could not succeed.

    saved  name -> tensor, as `module.state_dict()` gives it
    Shapes are compared where a name is in both. Names are compared only if every module loads as nn.Module does: hooks
    and overrides may rename.
    """
    if not isinstance(saved, dict):
        raise CheckpointError(f"{where}: the module is a {type(saved).__name__}, expected names and tensors.")
    expected = dict(_shapes(module))
    for name, shape in expected.items():
        tensor = saved.get(name)
        if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, this model's has {shape}: another model."
            )
    if not all(_loads_as_usual(one) for one in module.modules()):
        return
    missing, extra = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{where}: another model: {_few(missing)} missing in the file, {_few(extra)} not in this model.\n"
            "  Load it with load_module_strict=False if that is meant."
        )


def _shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of all that a state dict holds, without reading a value."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, tuple(getattr(parameter, "ds_shape", parameter.shape))
    for prefix, one in module.named_modules(remove_duplicate=False):
        for name, buffer in one._buffers.items():
            if buffer is not None and name not in one._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, tuple(buffer.shape)


def _loads_as_usual(module: nn.Module) -> bool:
    cls = type(module)
    same = all(
        getattr(cls, name) is getattr(nn.Module, name)
        for name in ("_load_from_state_dict", "load_state_dict", "state_dict", "_save_to_state_dict", "get_extra_state")
    )
    hooks = (module._load_state_dict_pre_hooks, module._state_dict_hooks, module._state_dict_pre_hooks)
    return same and not any(hooks) and not hasattr(module, "parametrizations")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"
