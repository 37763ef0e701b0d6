"""`mxfp8`: one scale for each 32 elements, on Blackwell. Transformer Engine casts and multiplies; nothing here does."""

from __future__ import annotations

from .base import Scaling


class MXFP8Scaling(Scaling):
    te_class = "MXFP8BlockScaling"
    te_probe = "is_mxfp8_available"
    te_quantized = None


SCALING = MXFP8Scaling()
