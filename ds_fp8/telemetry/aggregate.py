"""About twenty numbers for all layers together: what a dashboard can hold.

For each role (input, weight, grad_output): the largest and the median amax, the least headroom, how many operands were
clamped, and the mean share of elements flushed to zero where it was measured. Besides: operands with inf or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import mean, median

from .reading import ROLES, Reading

PREFIX = "Train/Samples/ds_fp8"


def aggregate(readings: Iterable[Reading]) -> dict[str, float]:
    """Name -> value. A role without a reading is left out, so that no plot shows an invented zero."""
    readings = list(readings)
    result: dict[str, float] = {}
    for role in ROLES:
        own = [reading for reading in readings if reading.role == role and reading.is_finite and reading.amax > 0]
        if not own:
            continue
        amaxes = [reading.amax for reading in own]
        result[f"{role}/amax_max"] = max(amaxes)
        result[f"{role}/amax_median"] = median(amaxes)
        result[f"{role}/headroom_min_bits"] = min(reading.headroom_bits for reading in own)
        result[f"{role}/headroom_max_bits"] = max(reading.headroom_bits for reading in own)
        result[f"{role}/saturated_tensors"] = float(sum(reading.is_saturated for reading in own))
        measured = [reading.underflow for reading in own if reading.underflow is not None]
        if measured:
            result[f"{role}/underflow_share"] = mean(measured)
    if readings:
        result["nonfinite_tensors"] = float(sum(not reading.is_finite for reading in readings))
    return result


def events(values: dict[str, float], samples: int) -> list[tuple[str, float, int]]:
    """The same numbers as DeepSpeed's monitor takes them; what is not finite cannot be plotted and is left out."""
    return [(f"{PREFIX}/{name}", value, samples) for name, value in values.items() if math.isfinite(value)]
