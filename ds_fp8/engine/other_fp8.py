"""Layers that another library has converted to FP8 already are refused.

Accelerate's `mixed_precision: fp8` with its backend AO replaces `nn.Linear` by torchao's Float8Linear before DeepSpeed
sees the model, with its backend TE by Transformer Engine's. What it leaves (first and last layer, odd sizes) would then
be ours, and the banner would speak of those few.
"""

from __future__ import annotations

import sys
from typing import Any

from ..errors import PlanError

TORCHAO = "torchao.float8."
TRANSFORMER_ENGINE = "transformer_engine."
"""Where such classes are defined. Transformer Engine's count where Accelerate put them: a model may be written with
them.
"""


def refuse_other_fp8(model: Any) -> None:
    """Raises PlanError that names the layers and the way out."""
    _refuse(model, TORCHAO, "torchao")
    if _accelerate_computes_in_fp8():
        _refuse(model, TRANSFORMER_ENGINE, "Transformer Engine, by Accelerate's mixed_precision fp8,")


def _refuse(model: Any, package: str, library: str) -> None:
    found = [name for name, module in model.named_modules() if type(module).__module__.startswith(package)]
    if found:
        shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
        raise PlanError(
            f"fp8 is enabled, but {library} computes in FP8 here already: {shown}.\n"
            "  Choose one: in Accelerate `mixed_precision: bf16` beside the JSON's fp8 section, or mixed_precision fp8 "
            "and no fp8 section."
        )


def _accelerate_computes_in_fp8() -> bool:
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    return getattr(state, "_shared_state", {}).get("_mixed_precision") == "fp8"
