"""`nvfp4`: one scale for each 16 elements, on Blackwell. Transformer Engine casts and multiplies; nothing here does."""

from __future__ import annotations

from typing import Any

from .base import Scaling


class NVFP4Scaling(Scaling):
    te_class = "NVFP4BlockScaling"
    te_probe = "is_nvfp4_available"
    te_quantized = None

    def te_arguments(self, formats: Any, recipe: Any) -> dict[str, Any]:
        return {}  # its elements have one format, FP4


SCALING = NVFP4Scaling()
