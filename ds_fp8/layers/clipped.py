"""What delayed scaling has clipped: amaxes of a step beyond what their columns' scales could take.

A scale comes from earlier steps, so a tensor that is suddenly larger saturates. In training that is a factor of two now
and then, and harmless. A factor of sixteen comes from a script that does something else with the model: gradients of
another thing than the loss, batches of another kind. Their numbers are wrong, and nothing else would say so.
"""

from __future__ import annotations

import torch

from .scales import ScaleTensors

WORTH_A_WORD = 16.0
"""How many times its scale's range an amax must have to be reported: four bits."""


class ClippedColumns:
    """Looks at the amaxes of a step before they go into the histories; two products and a maximum on the device."""

    def __init__(self) -> None:
        self._inv_range: torch.Tensor | None = None
        self._unknown: frozenset[int] | None = None

    def largest(self, tensors: ScaleTensors) -> torch.Tensor:
        """[2] fp32 on the device: how many times its range the amax of a column has at most, and which column.

        Columns without history are cast by their own amax, and so are weights that outgrow theirs (`Scales.of_weight`).
        """
        if not tensors.layers:
            return torch.zeros(2, dtype=torch.float32, device=tensors.device)
        if self._inv_range is None or self._unknown is not tensors.current.unknown:
            self._unknown = tensors.current.unknown
            self._inv_range = _inv_range(tensors)
        excess, column = (tensors.pending * tensors.scales * self._inv_range).max(0)
        return torch.stack([excess, column.to(excess.dtype)])


def _inv_range(tensors: ScaleTensors) -> torch.Tensor:
    """[3n] fp32: 1 / format.max; 0 for columns that cannot be clipped."""
    split = 2 * tensors.layers
    ranges = [1 / tensors.forward.format.max] * split + [1 / tensors.backward.format.max] * tensors.layers
    own = set(tensors.current.unknown) | (set() if tensors.exact else set(range(1, split, 2)))
    kept = [0.0 if column in own else one for column, one in enumerate(ranges)]
    return torch.tensor(kept, dtype=torch.float32, device="cpu").to(tensors.device, non_blocking=True)
