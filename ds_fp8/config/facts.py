"""The facts of DeepSpeed's own sections that our plan depends on.

"auto" and invalid values count as absent: DeepSpeed or the trainer reports them. Nothing is decided here.
"""

from __future__ import annotations

import math
from typing import Any

from .settings import DeepSpeedFacts


def section(data: dict[str, Any], name: str) -> dict[str, Any]:
    """A section as a dict; empty when it is absent or no object."""
    value = data.get(name)
    return value if isinstance(value, dict) else {}


def is_on(data: dict[str, Any], name: str) -> bool:
    """A section is present with `"enabled": true`."""
    return section(data, name).get("enabled") is True


def zero_stage(data: dict[str, Any]) -> int:
    """ZeRO stage 0 to 3; the old form `"zero_optimization": true` is stage 1."""
    zero = data.get("zero_optimization")
    if isinstance(zero, bool):
        return int(zero)
    stage = section(data, "zero_optimization").get("stage", 0)
    return int(stage) if isinstance(stage, (int, float)) and stage in (0, 1, 2, 3) else 0


def base_dtype(data: dict[str, Any]) -> str:
    """What DeepSpeed casts parameters to. Under torch_autocast they stay fp32.

    "auto" is decided by the trainer above DeepSpeed before an engine sees it; until then the 16-bit type is planned
    with.
    """
    if is_on(data, "bf16") or ("bf16" not in data and is_on(data, "bfloat16")):
        return "bf16"
    if is_on(data, "fp16"):
        return "fp16"
    return next((name for name in ("bf16", "fp16") if _is_auto(data, name)), "fp32")


def dtype_is_auto(data: dict[str, Any]) -> bool:
    """No 16-bit type is switched on, and one may be by the trainer."""
    decided = is_on(data, "bf16") or is_on(data, "fp16") or is_on(data, "bfloat16")
    return not decided and (_is_auto(data, "bf16") or _is_auto(data, "fp16"))


def _is_auto(data: dict[str, Any], name: str) -> bool:
    return section(data, name).get("enabled") == "auto"


def offload_device(data: dict[str, Any], key: str) -> str | None:
    """`cpu`, `nvme` or None, for `offload_optimizer` or `offload_param`, in the new or the deprecated form."""
    zero = section(data, "zero_optimization")
    device = section(zero, key).get("device")
    if isinstance(device, str) and device not in ("none", "auto"):
        return device
    old = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}[key]
    return "cpu" if zero.get(old) is True else None


def optimizer_type(data: dict[str, Any]) -> str | None:
    """`optimizer.type` as written, None for a client optimizer or "auto"."""
    name = section(data, "optimizer").get("type")
    return name if isinstance(name, str) and name != "auto" else None


def read_facts(data: dict[str, Any]) -> DeepSpeedFacts:
    """All facts at once."""
    gas = data.get("gradient_accumulation_steps")
    return DeepSpeedFacts(
        zero_stage=zero_stage(data),
        base_dtype=base_dtype(data),
        dtype_is_auto=dtype_is_auto(data),
        gradient_accumulation_steps=int(gas) if isinstance(gas, (int, float)) and 1 <= gas < math.inf else None,
        offload_optimizer=offload_device(data, "offload_optimizer"),
        offload_param=offload_device(data, "offload_param"),
        optimizer=optimizer_type(data),
        torch_autocast=is_on(data, "torch_autocast"),
        raw=data,
    )
