"""About twenty numbers for all layers together, for a dashboard.

For each role (input, weight, grad_output): the largest and the median amax, the least headroom, how many operands were
clamped, and the mean share of elements flushed to zero where it was measured. Besides: operands with inf or NaN, and
how many alarms hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean, median

from .alarms import Alarm
from .tensor_statistics import ROLES, TensorStatistics

PREFIX = "Train/Samples/ds_fp8"


def aggregate(statistics: Iterable[TensorStatistics], alarms: Sequence[Alarm] = ()) -> dict[str, float]:
    """Name -> value; `alarms` are counted. A role that was not measured is left out, so that no plot shows an invented
    zero.
    """
    statistics = list(statistics)
    result: dict[str, float] = {}
    for role in ROLES:
        own = [operand for operand in statistics if operand.role == role and operand.is_finite and operand.amax > 0]
        if not own:
            continue
        amaxes = [operand.amax for operand in own]
        result[f"{role}/amax_max"] = max(amaxes)
        result[f"{role}/amax_median"] = median(amaxes)
        result[f"{role}/headroom_min_bits"] = min(operand.headroom_bits for operand in own)
        result[f"{role}/headroom_max_bits"] = max(operand.headroom_bits for operand in own)
        result[f"{role}/saturated_tensors"] = float(sum(operand.is_saturated for operand in own))
        measured = [operand.underflow for operand in own if operand.underflow is not None]
        if measured:
            result[f"{role}/underflow_share"] = mean(measured)
    if statistics:
        result["nonfinite_tensors"] = float(sum(not operand.is_finite for operand in statistics))
        result["alarms"] = float(len(alarms))
    return result


def events(values: dict[str, float], samples: int) -> list[tuple[str, float, int]]:
    """The same numbers as DeepSpeed's monitor takes them; what is not finite cannot be plotted and is left out."""
    return [(f"{PREFIX}/{name}", value, samples) for name, value in values.items() if math.isfinite(value)]
