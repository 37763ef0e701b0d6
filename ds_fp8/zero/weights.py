"""O3: the owner of a weight makes the very codes that the FP8 layer would make, and only codes travel.

An FP8 layer casts its 16-bit weight to E4M3 before it multiplies. Under ZeRO every rank does that to the same gathered
16-bit weight, W times the same work on bytes that had to travel twice as wide. The owner can do it once: same 16-bit
source (the high half of its master), same scale (the recipe's), hence the same codes, hence bit-equal losses.

    delayed   scale from the history, which all ranks share; the new amax is exchanged for the history
    current   the amax first (MAX over the owners, a tensor may straddle partitions), then the cast
    block     the same with one amax per 128x128 tile

So one small MAX per step (a non-finite amax as inf: NCCL's MAX would lose a NaN), and no other new state. Parameters
that no FP8 layer owns travel in 16 bits as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from .. import kernels
from ..comm.counters import all_reduce_bytes, counters
from ..errors import PlanError
from ..formats import BLOCK_SIZE, E4M3
from ..layers import WeightCodes
from ..numerics.gemm_blocks import block_scale
from ..numerics.scaling import scale_from_amax
from .touched import touched

TOUCHED = {
    "Engine": touched(reads="module"),
    "Parameter": touched(reads="ds_shape"),
}


@dataclass(eq=False)
class OwnedWeight:
    """A weight that an FP8 layer owns: `layer.weight_codes` is where its codes belong."""

    name: str
    layer: Any
    param: Any
    shape: tuple[int, int]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def tiles(self) -> tuple[int, int]:
        return -(-self.shape[0] // BLOCK_SIZE), -(-self.shape[1] // BLOCK_SIZE)


@dataclass(eq=False)
class Segment:
    """The part of a weight that this rank owns.

    start   first element within the flattened weight
    source  flat 16-bit values
    codes   flat uint8, same numel, where the codes go
    """

    weight: OwnedWeight
    start: int
    source: Tensor
    codes: Tensor


class WeightCaster:
    """Casts this rank's segments with the scales of the layers' recipe. Every method is collective over `group`."""

    def __init__(self, weights: Sequence[OwnedWeight], book: Any, plan: Any, group: Any, device: torch.device):
        self.weights, self.book, self.group, self.device = list(weights), book, group, device
        self.kind = plan.fp8.recipe.kind
        self.index = {id(weight): number for number, weight in enumerate(self.weights)}
        counts = [w.tiles[0] * w.tiles[1] if self.kind == "block" else 1 for w in self.weights]
        self.counts = counts

    def cast(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Fill the segments' codes; returns scale_inv of every weight, in the shape its layer wants."""
        per_weight = self._exchange_amaxes(segments)
        if self.kind == "delayed":
            # The step's amaxes are in the histories already: these are the scales that the layers would cast with next.
            scales = []
            for weight, amax in zip(self.weights, per_weight, strict=True):
                scales.append(self.book.weight_scale(weight.layer, amax.view(())))
                self.book.record_weight_amax(weight.layer, amax.view(()))
        elif self.kind == "current":
            scales = [scale_from_amax(amax.view(()), E4M3) for amax in per_weight]
        else:
            scales = [
                block_scale(amax.view(w.tiles), E4M3, power_of_two=True)
                for w, amax in zip(self.weights, per_weight, strict=True)
            ]
        if self.kind == "block":
            for segment in segments:
                cast_tiles(segment, scales[self.index[id(segment.weight)]])
        elif segments:
            of_segments = torch.stack([scales[self.index[id(segment.weight)]] for segment in segments])
            sources, codes = [segment.source for segment in segments], [segment.codes for segment in segments]
            kernels.quantize_many(sources, of_segments, E4M3, codes)
        return [torch.reciprocal(scale) for scale in scales]

    def _exchange_amaxes(self, segments: Sequence[Segment]) -> list[Tensor]:
        """MAX over the owners of every tensor's or tile's amax, in one message."""
        amaxes = torch.zeros(sum(self.counts), dtype=torch.float32, device=self.device)
        per_weight = list(amaxes.split(self.counts))
        if self.kind == "block":
            for segment in segments:
                tile_amaxes(segment, per_weight[self.index[id(segment.weight)]].view(segment.weight.tiles))
        elif segments:
            found = kernels.amax_many([segment.source for segment in segments])
            owners = [self.index[id(segment.weight)] for segment in segments]
            if owners == list(range(len(self.weights))):
                amaxes.copy_(found)
            else:
                for owner, amax in zip(owners, found.split(1), strict=True):
                    torch.maximum(per_weight[owner], amax, out=per_weight[owner])
        world_size = dist.get_world_size(group=self.group)
        if world_size > 1:
            dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=self.group)
            counters.add("scale", all_reduce_bytes(amaxes.numel(), 4, world_size))
        return per_weight


def row_runs(start: int, numel: int, width: int) -> list[tuple[int, int, int, int, int]]:
    """Cut elements [start, start + numel) of a row-major matrix into runs (offset, length, row, column, rows).

    A run is a part of one row (rows = 1), or whole rows; no run crosses a border between tiles of 128 rows.
    """
    runs, position, stop = [], start, start + numel
    while position < stop:
        row, column = divmod(position, width)
        if column or stop - position < width:
            length, rows = min(width - column, stop - position), 1
        else:
            rows = min((stop - position) // width, BLOCK_SIZE - row % BLOCK_SIZE)
            length = rows * width
        runs.append((position - start, length, row, column, rows))
        position += length
    return runs


def _columns_of(column: int, length: int, device: torch.device) -> Tensor:
    """Tile column of each of `length` elements that begin at `column`."""
    return torch.arange(column, column + length, device=device) // BLOCK_SIZE


def tile_amaxes(segment: Segment, amaxes: Tensor) -> None:
    """MAX the amax of each 128x128 tile that the segment touches into `amaxes` [tile rows, tile columns]."""
    width = segment.weight.shape[1]
    for offset, length, row, column, rows in row_runs(segment.start, segment.source.numel(), width):
        values = segment.source[offset : offset + length].float().abs().view(rows, -1).amax(0)
        # NaN as inf, as every amax that crosses the network
        values = torch.where(values.isnan(), torch.full_like(values, torch.inf), values)
        amaxes[row // BLOCK_SIZE].scatter_reduce_(0, _columns_of(column, values.numel(), values.device), values, "amax")


def cast_tiles(segment: Segment, scales: Tensor) -> None:
    """Cast with one scale per 128x128 tile, the same product and rounding as `quantize_128x128`."""
    width = segment.weight.shape[1]
    one = torch.ones((), dtype=torch.float32, device=scales.device)
    for offset, length, row, column, rows in row_runs(segment.start, segment.source.numel(), width):
        values = segment.source[offset : offset + length].float().view(rows, -1)
        scaled = values * scales[row // BLOCK_SIZE][_columns_of(column, values.shape[1], values.device)]
        codes = kernels.quantize(scaled.view(-1), one, E4M3)
        segment.codes[offset : offset + length].copy_(codes.view(torch.uint8))


def find_owned(module: torch.nn.Module, names: Sequence[str]) -> list[OwnedWeight]:
    """The layers of `module` that take codes for the parameters in `names`, in model order."""
    wanted, found = set(names), []
    for fqn, layer in module.named_modules():
        name = f"{fqn}.weight" if fqn else "weight"
        if name in wanted and hasattr(layer, "weight_codes"):
            verify = getattr(layer, "verify_codes", None)
            if verify is not None:
                verify()
            param = layer.weight
            shape = tuple(getattr(param, "ds_shape", param.shape))
            found.append(OwnedWeight(name, layer, param, shape))
    missing = wanted - {weight.name for weight in found}
    if missing:
        raise PlanError(
            f"msamp/weight_wire e4m3: {len(missing)} of {len(wanted)} weights of the plan have no FP8 layer that takes"
            f" codes, among them {min(missing)}.\n  Set weight_wire to none, or fp8/backend to torch."
        )
    return found


def set_codes(weight: OwnedWeight, codes: Tensor, scale_inv: Tensor) -> None:
    """Hand codes (flat uint8) to the layer; it keeps a view, no copy."""
    weight.layer.weight_codes = WeightCodes(codes.view(torch.float8_e4m3fn).view(weight.shape), scale_inv)


def drop_codes(weight: OwnedWeight) -> None:
    # Setting it makes the layer forget what it cached itself, so only when there is something to drop.
    if weight.layer.weight_codes is not None:
        weight.layer.weight_codes = None


def attach_weights(engine: Any, zero_optimizer: Any, plan: Any, book: Any) -> None:
    """Lay out stores for the weights of the plan; from the first step on their codes travel."""
    weights = find_owned(engine.module, plan.comm.fp8_weights)
    zero_optimizer.fp8_lay_out_weights(engine, weights, plan, book)
