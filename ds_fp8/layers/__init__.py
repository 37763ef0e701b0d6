"""FP8 layers: they replace the model's by the plan, keep the scales, and are taken out again.

swap_layers(model, plan)   nn.Linear -> Fp8Linear or te.Linear, norms likewise; the same Parameter objects
restore_layers(model)      torch's layers again
ModelFp8State              amax histories and scales of all layers, their update once per step, state
holders_of(layer)          where quantized values of its weights are set from outside
QuantizedWeight            a weight that its owner has cast (O3)
"""

from __future__ import annotations

from .experts_state import holders_of
from .fp8_linear import Fp8Linear
from .fp8_state import ModelFp8State
from .layer_state import QuantizedWeight
from .norms import Fp8LayerNorm, Fp8RMSNorm
from .swap import restore_layers, swap_layers

__all__ = [
    "Fp8LayerNorm",
    "Fp8Linear",
    "Fp8RMSNorm",
    "ModelFp8State",
    "QuantizedWeight",
    "holders_of",
    "restore_layers",
    "swap_layers",
]
