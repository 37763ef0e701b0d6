"""Every name of Transformer Engine that we use, in one place, with the parameters that we count on.

Transformer Engine moves: `fp8_autocast` became `autocast` in 2.9, the state manager moved from `fp8.py` to
`quantization.py`, recipes swallow unknown arguments. So the names are resolved once, `verify` compares their signatures
with what our adapter passes, and an unknown Transformer Engine is refused with the list of what differs.

Private is only this: the key under which a layer notes that it takes part in the global update of all scales, the
attributes `fp8_meta`, `quantizers` and `init_fp8_metadata` of a layer (`linear.py` says why they are needed), and for
O3 its cache of quantized weights and the tensors in it (`quantized_weight.py`). Supported: 2.2 to 2.20; run on an H200
with 2.11.0 and 2.20.2.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ...errors import BackendError
from ..recipes import scaling_of

NEEDED: dict[str, tuple[str, ...]] = {
    "pytorch.Linear": ("in_features", "out_features", "bias", "params_dtype", "device"),
    "pytorch.Linear.forward": ("inp", "is_first_microbatch"),
    "pytorch.Linear.init_fp8_metadata": ("num_gemms",),
    "pytorch.LayerNorm": ("normalized_shape", "eps"),
    "pytorch.RMSNorm": ("normalized_shape", "eps"),
    "pytorch.LayerNormLinear": (
        "in_features",
        "out_features",
        "eps",
        "bias",
        "normalization",
        "params_dtype",
        "device",
    ),
    "recipe.DelayedScaling": ("margin", "fp8_format", "amax_history_len", "amax_compute_algo", "reduce_amax"),
    "recipe.Format": (),
}
"""Dotted name -> parameters that must be there; `**kwargs` counts as any."""

OPTIONAL = ("recipe.Float8CurrentScaling", "recipe.Float8BlockScaling", "recipe.MXFP8BlockScaling",
            "recipe.NVFP4BlockScaling")  # fmt: skip
"""Recipes that came later; a job that asks for a missing one is refused by name."""

WORKSPACE = "_fp8_workspaces"
"""Attribute of a layer: its cache of quantized weights, by the name of the Parameter."""

_IMPORT_ERRORS = (ImportError, RuntimeError, OSError, AssertionError)
# The metapackage alone raises RuntimeError, a wrong CUDA OSError, a missing extension AssertionError.


@dataclass(frozen=True)
class TransformerEngine:
    """The resolved library.

    pytorch, recipe   its modules
    buffer_key        name under which `fp8_meta` notes membership in the global update
    """

    version: str
    pytorch: ModuleType
    recipe: ModuleType
    buffer_key: str

    def autocast(self, scaling: Any) -> AbstractContextManager[Any]:
        """FP8 for the calls inside, with `scaling` (a recipe of Transformer Engine)."""
        if hasattr(self.pytorch, "autocast"):
            return self.pytorch.autocast(enabled=True, recipe=scaling)
        return self.pytorch.fp8_autocast(enabled=True, fp8_recipe=scaling)

    def availability(self, kind: str) -> tuple[bool, str]:
        """Whether the device runs recipe `kind`, and the reason if not."""
        ask = getattr(self.pytorch, scaling_of(kind).te_probe, None)
        if ask is None:
            return False, f"Transformer Engine {self.version} does not know this recipe"
        try:
            found, reason = ask(return_reason=True)
        except (RuntimeError, AssertionError) as error:  # it asks the driver, which may not be there
            return False, str(error).splitlines()[0]
        return bool(found), str(reason)


@functools.cache
def load() -> TransformerEngine:
    """Import Transformer Engine and check it.

    Raises BackendError with the reason: not installed, not loadable here, or unlike the versions that we know.
    """
    try:
        package = importlib.import_module("transformer_engine")
        pytorch = importlib.import_module("transformer_engine.pytorch")
        recipe = importlib.import_module("transformer_engine.common.recipe")
    except _IMPORT_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendError(
            f"fp8/backend transformer_engine: Transformer Engine cannot be imported ({reason}).\n"
            "  Install transformer-engine[pytorch] for this torch and CUDA, or set fp8/backend to torch."
        ) from error
    version = str(getattr(package, "__version__", "unknown"))
    differences = verify(pytorch, recipe)
    try:
        key = state_manager().get_buffer_info()
    except (AttributeError, ImportError) as error:
        differences.append(f"FP8GlobalStateManager.get_buffer_info: {error}")
        key = ""
    if differences:
        listed = "\n".join(f"  {line}" for line in differences)
        raise BackendError(
            f"Transformer Engine {version} differs from the versions that ds_fp8 knows (2.2 to 2.20):\n{listed}\n"
            "  Install one of those, or set fp8/backend to torch."
        )
    return TransformerEngine(version, pytorch, recipe, key)


@functools.cache
def quantized_class(kind: str) -> type[Any]:
    """The class of a quantized weight under recipe `kind`.

    Raises BackendError with what differs from the class that we know.
    """
    quantized = scaling_of(kind).te_quantized
    assert quantized is not None, f"the plan lets no weight of recipe {kind} travel in FP8"
    module, name, parameters = quantized
    try:
        found = getattr(importlib.import_module(f"transformer_engine.pytorch.tensor.{module}"), name)
    except (AttributeError, *_IMPORT_ERRORS) as error:
        differences = [str(error).splitlines()[0]]
    else:
        differences = [parameter for parameter in parameters if parameter not in accepted(found.__new__)]
        if not {"rowwise_usage", "columnwise_usage"} <= accepted(getattr(found, "update_usage", _nothing)):
            differences.append("update_usage")
    if differences:
        raise BackendError(
            f"msamp/weight_wire e4m3: Transformer Engine's {name} for recipe {kind} is not the one that ds_fp8 knows: "
            f"it lacks {', '.join(differences)}.\n  Set msamp/weight_wire to none, or fp8/backend to torch."
        )
    return found


def _nothing() -> None:
    """Stands for a method that is not there: it takes no parameter."""


def state_manager() -> Any:
    """Transformer Engine's FP8GlobalStateManager, wherever this version keeps it."""
    try:
        module = importlib.import_module("transformer_engine.pytorch.quantization")
    except ImportError:
        module = importlib.import_module("transformer_engine.pytorch.fp8")
    return module.FP8GlobalStateManager


def verify(pytorch: ModuleType, recipe: ModuleType) -> list[str]:
    """One line for each needed name that is missing or lacks a parameter."""
    roots = {"pytorch": pytorch, "recipe": recipe}
    differences = []
    for name, parameters in NEEDED.items():
        root, *path = name.split(".")
        try:
            found: Any = functools.reduce(getattr, path, roots[root])
        except AttributeError:
            differences.append(f"{name} is missing")
            continue
        if parameters:
            lacking = [parameter for parameter in parameters if parameter not in accepted(found)]
            if lacking and "**" not in accepted(found):
                differences.append(f"{name} lacks {', '.join(lacking)}")
    if not (hasattr(pytorch, "autocast") or hasattr(pytorch, "fp8_autocast")):
        differences.append("neither autocast nor fp8_autocast is there")
    return differences


def accepted(found: Callable[..., Any]) -> set[str]:
    """Names of the parameters of a function or class; `**` when it takes any."""
    parameters = inspect.signature(found).parameters.values()
    names = {parameter.name for parameter in parameters}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        names.add("**")
    return names
