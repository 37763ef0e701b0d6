"""FP8 layers: obeying the plan, keeping the scales, giving the plain layers back.

swap_layers(model, plan)   nn.Linear -> Fp8Linear or te.Linear, norms likewise; the same Parameter objects
restore_layers(model)      plain torch layers again
ScaleBook                  amax histories and scales of all layers, their update once per step, state
WeightCodes                a weight that somebody else cast (O3)
"""

from __future__ import annotations

from .fp8_linear import Fp8Linear
from .norms import Fp8LayerNorm, Fp8RMSNorm
from .page import WeightCodes
from .scale_book import ScaleBook
from .swap import restore_layers, swap_layers

__all__ = ["Fp8LayerNorm", "Fp8Linear", "Fp8RMSNorm", "ScaleBook", "WeightCodes", "restore_layers", "swap_layers"]
