"""Statistics of one operand of one FP8 layer: how much of its format's range it uses.

    used = amax * scale / format.max        1 fills the range; above 1 the largest values are clamped
    headroom = -log2(used)                  bits between the largest value and the end of the range

With a scale from this very amax `used` is 1 (or 2^-margin). With delayed scaling the scale is older than the amax, so
`used` shows how well earlier steps predict this one: far above 1 clips, far below 1 flushes small values to zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..formats import Format

ROLES = ("input", "weight", "grad_output")


@dataclass(frozen=True)
class TensorStatistics:
    """One operand at one step.

    fqn                       the layer
    role                      one of ROLES
    amax                      largest absolute value; inf when the tensor held inf or NaN
    scale                     factor on the way into FP8
    format                    the format it was cast to
    underflow                 share of nonzero elements that became zero; None where it was not measured (only the amax
                              is known, or no element is nonzero)
    margin                    `fp8/margin`, powers of two by which the scale stays below the range
    underflow_without_margin  that share, had margin been 0
    underflow_of_own_amax     that share, had the scale been made from this very amax without a margin
    """

    fqn: str
    role: str
    amax: float
    scale: float
    format: Format
    underflow: float | None = None
    margin: int = 0
    underflow_without_margin: float | None = None
    underflow_of_own_amax: float | None = None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.amax)

    @property
    def used(self) -> float:
        return self.amax * self.scale / self.format.max

    @property
    def is_saturated(self) -> bool:
        """Some element lay beyond the range and was clamped; one rounding of the product itself is forgiven."""
        return self.is_finite and self.used > 1 + 2**-20

    @property
    def headroom_bits(self) -> float:
        return math.inf if self.amax == 0 else -math.log2(self.used) if self.is_finite else -math.inf

    def to_json(self) -> dict[str, object]:
        """Built-in values; what JSON cannot say (inf, NaN) as strings."""
        return {
            "fqn": self.fqn,
            "role": self.role,
            "format": self.format.name,
            "amax": self.amax if self.is_finite else str(self.amax),
            "scale": self.scale,
            "used": self.used if self.is_finite else str(self.used),
            "underflow": self.underflow,
        }
