"""What this host can do, asked once and kept as facts.

The plan decides from a `Host`, never from the machine itself, so a plan for another machine (`ds_fp8 explain` for an
H100 written on a laptop) and the tests of every refusal need only another `Host`. torch and Transformer Engine are
imported inside the functions: reading this module costs nothing.

Which GPU multiplies FP8: Ada and Hopper (compute capability 8.9 and 9.0) per-tensor and block scaled; Blackwell
(10.0 and later) also mxfp8 and nvfp4. Source: Transformer Engine's user guide, FP8 primer.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from .errors import PlanError

FP8_SINCE = (8, 9)


@dataclass(frozen=True)
class Host:
    """The facts that a plan depends on.

    device_type         `cpu`, `cuda`, ... where the model will run
    device_name         as the vendor writes it; empty on CPU
    compute_capability  (major, minor) of a CUDA device, else None
    transformer_engine  version of Transformer Engine if it imports here, else None; UNASKED on this machine
    transformer_engine_reason  why it does not
    """

    device_type: str = "cpu"
    device_name: str = ""
    compute_capability: tuple[int, int] | None = None
    transformer_engine: str | None = None
    transformer_engine_reason: str = "not installed"

    def at_least(self, capability: tuple[int, int]) -> bool:
        return self.compute_capability is not None and self.compute_capability >= capability

    @property
    def multiplies_fp8(self) -> bool:
        """The device has FP8 matrix products with one scale per tensor."""
        return self.at_least(FP8_SINCE)

    @property
    def why_no_transformer_engine(self) -> str | None:
        """Why Transformer Engine's layers do not run here; None where they do. On this machine it is imported to know,
        which takes seconds and memory, and may change which attention kernel torch takes: ask where it matters only.
        """
        version, reason = self.transformer_engine, self.transformer_engine_reason
        if version == UNASKED:
            version, reason = transformer_engine()
        if version is not None and self.multiplies_fp8:
            return None
        major, minor = FP8_SINCE
        needed = f"needs a CUDA device of compute capability {major}.{minor} or later, this is {self}"
        return reason or needed

    def __str__(self) -> str:
        if self.compute_capability is None:
            return self.device_name or self.device_type
        major, minor = self.compute_capability
        return f"{self.device_name or self.device_type}, compute capability {major}.{minor}"


UNASKED = "unasked"
"""Version of Transformer Engine on this machine, until somebody wants to know."""

ASSUMED = "assumed"
"""Version of Transformer Engine on a machine that is not here."""

MACHINES = {
    "a100": Host("cuda", "NVIDIA A100", (8, 0), ASSUMED, ""),
    "l40s": Host("cuda", "NVIDIA L40S", (8, 9), ASSUMED, ""),
    "h100": Host("cuda", "NVIDIA H100", (9, 0), ASSUMED, ""),
    "h200": Host("cuda", "NVIDIA H200", (9, 0), ASSUMED, ""),
    "b200": Host("cuda", "NVIDIA B200", (10, 0), ASSUMED, ""),
}
"""Machines that can be planned for from anywhere, by name. Source: NVIDIA's list of compute capabilities."""


def machine(name: str) -> Host | None:
    """One of MACHINES; None for a device of this machine. Raises PlanError for any other name."""
    if name in MACHINES:
        return MACHINES[name]
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()):
        return None
    raise PlanError(
        f"--device {name}: no device of this machine, and none of {', '.join(MACHINES)}.\n  Use one of these, or cpu."
    )


def host(device: Any = "cpu") -> Host:
    """Facts about this machine as seen from `device` (torch.device or its name)."""
    import torch

    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return Host(device.type, "", None, UNASKED, "")
    major, minor = torch.cuda.get_device_capability(device)
    return Host("cuda", torch.cuda.get_device_name(device), (major, minor), UNASKED, "")


@functools.lru_cache(maxsize=1)
def transformer_engine() -> tuple[str | None, str]:
    """(version, "") if Transformer Engine imports, else (None, why not).

    On a machine without CUDA its metapackage installs and then raises RuntimeError on import; a library that does not
    load raises OSError, an unfitting torch AssertionError. Without CUDA we do not even try.
    """
    import torch

    if not torch.cuda.is_available():
        return None, "needs a CUDA device"
    try:
        importlib.import_module("transformer_engine.pytorch")
        return str(importlib.import_module("transformer_engine").__version__), ""
    except ModuleNotFoundError as error:
        return None, "not installed" if (error.name or "").startswith(
            "transformer_engine"
        ) else f"does not import: {error}"
    except (ImportError, RuntimeError, OSError, AssertionError, AttributeError) as error:
        return None, f"does not import: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
