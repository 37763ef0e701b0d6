"""Communication between ranks: gradients and weights as bytes, through `deepspeed.comm` only.

Read in this order: `wire` (what travels), `cut` (whose is what of a bucket), `reduce` (who sums what), `route` (nodes
and groups), `gather` (weights in quantized form, O3), `meeting` (whether all ranks ask for the same thing), `counters`
(bytes saved).
"""

from .counters import WireCounters, counters
from .gather import all_gather_shares
from .meeting import Meeting
from .reduce import all_reduce, reduce_cut, reduce_slices
from .route import Route, flat_route, two_level_routes
from .wire import Wire

__all__ = [
    "Meeting",
    "Route",
    "Wire",
    "WireCounters",
    "all_gather_shares",
    "all_reduce",
    "counters",
    "flat_route",
    "reduce_cut",
    "reduce_slices",
    "two_level_routes",
]
