"""The cost of a whole job on one rank: `memory` and `wire`, summed over parameters of the same kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .memory import Bytes, Kept, Placement, bytes_of
from .wire import gradient_bytes, network_gradient_bytes, network_weight_bytes, weight_bytes


@dataclass(frozen=True)
class Part:
    """A number of parameters that are kept and sent alike; the wires are a format, or none for the base dtype."""

    numel: int
    kept: Kept
    gradient_wire: str = "none"
    weight_wire: str = "none"
    gradient_wire_scope: str = "auto"


@dataclass(frozen=True)
class Cost:
    """Bytes on one rank: kept on the device and on the host, and sent in one optimizer step; and what a node of the
    job sends to the other nodes in one step.
    """

    device: Bytes = field(default_factory=Bytes)
    host: Bytes = field(default_factory=Bytes)
    gradient_wire_bytes: float = 0.0
    weight_wire_bytes: float = 0.0
    network_gradient_bytes: float = 0.0
    network_weight_bytes: float = 0.0


def cost_of(parts: Iterable[Part], where: Placement) -> Cost:
    """Frozen parameters have no gradient, and only stage 3 gathers them."""
    device, host, gradients, weights = Bytes(), Bytes(), 0.0, 0.0
    network_gradients, network_weights = 0.0, 0.0
    for part in parts:
        on_device, on_host = bytes_of(part.kept, where)
        device, host = device + on_device.times(part.numel), host + on_host.times(part.numel)
        if not part.kept.is_frozen:
            gradients += part.numel * gradient_bytes(part.gradient_wire, where)
            sent = network_gradient_bytes(part.gradient_wire, part.gradient_wire_scope, where)
            network_gradients += part.numel * sent
        if not part.kept.is_frozen or where.zero_stage == 3:
            weights += part.numel * weight_bytes(part.weight_wire, where)
            network_weights += part.numel * network_weight_bytes(part.weight_wire, where)
    return Cost(device, host, gradients, weights, network_gradients, network_weights)
