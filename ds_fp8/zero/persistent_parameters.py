"""ZeRO 3's small parameters after a step: one all-gather instead of one for each.

DeepSpeed keeps parameters below `stage3_param_persistence_threshold` whole on every rank, norms and biases mostly, and
gathers each of them by a collective of its own after the step: 180 in a GPT of 22 layers, a few thousand bytes each,
all of it latency. Here the shares of all travel in one message. Shares of one size lie side by side in it, so that one
copy turns what arrived (rank by rank) into whole parameters (one by one): a launch for each size, not for each
parameter.

Gathered weights are DeepSpeed's to the bit. What differs from that keeps DeepSpeed's path: quantized or secondary
shares, shares that lie elsewhere, parameters that are there already.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, groupby
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from torch import Tensor

from .portions import portions
from .touched import touched

TOUCHED = {
    "Parameter": touched(
        reads="ds_numel ds_quant_scale ds_secondary_tensor ds_shape ds_status ds_tensor status", writes="ds_status"
    ),
}

MOST_NUMEL = 1 << 25
"""Elements of whole parameters that one message makes: temporaries are twice as many."""


def is_unmodified(param: Any) -> bool:
    """Whether the parameter is away and its share lies here as it will travel."""
    share = param.ds_tensor
    return (
        param.ds_status == ZeroParamStatus.NOT_AVAILABLE
        and share.status == PartitionedParamStatus.AVAILABLE
        and share.device.type == get_accelerator().device_name()
        and not hasattr(share, "ds_quant_scale")
        and getattr(param, "ds_secondary_tensor", None) is None
    )


def gather_together(params: list[Any], group_of: Callable[[Any], Any]) -> list[Any]:
    """Gather the parameters on all ranks; a collective of each of their groups. Returns those left to DeepSpeed.

    group_of  the process group over which a parameter is cut
    """
    left: list[Any] = []
    # (group, dtype) -> the group, and its parameters by the size of their shares. In the order of `params`: alike on
    # all ranks.
    found: dict[tuple[int, torch.dtype], tuple[Any, dict[int, list[Any]]]] = {}
    for param in params:
        group = group_of(param)
        if not is_unmodified(param) or dist.get_world_size(group=group) == 1:
            left.append(param)
            continue
        share = param.ds_tensor
        _, sizes = found.setdefault((id(group), share.dtype), (group, {}))
        sizes.setdefault(share.ds_numel, []).append(param)
    for group, sizes in found.values():
        most = MOST_NUMEL // dist.get_world_size(group=group)
        for part in portions(chain.from_iterable(sizes.values()), lambda param: param.ds_tensor.ds_numel, most):
            _gather(part, group)
    return left


def _gather(params: list[Any], group: Any) -> None:
    world_size = dist.get_world_size(group=group)
    message = torch.cat([param.ds_tensor.data.view(-1) for param in params])
    arrived = torch.empty(world_size * message.numel(), dtype=message.dtype, device=message.device)
    dist.all_gather_into_tensor(arrived, message, group=group)
    rows, start = arrived.view(world_size, -1), 0
    for numel, alike in groupby(params, key=lambda param: param.ds_tensor.ds_numel):
        members = list(alike)
        stop = start + numel * len(members)
        # Each begins at a multiple of 16 bytes, as one that was allocated by itself would: products want that of a
        # bias.
        step = -(-world_size * numel * message.element_size() // 16) * 16 // message.element_size()
        whole = torch.empty(len(members), step, dtype=message.dtype, device=message.device)
        target = whole[:, : world_size * numel].unflatten(1, (world_size, numel))
        target.copy_(rows[:, start:stop].unflatten(1, (len(members), numel)).transpose(0, 1))
        for param, flat in zip(members, whole, strict=True):
            _set_whole(param, flat)
        start = stop


def _set_whole(param: Any, flat: Tensor) -> None:
    """Parts of one tensor: its memory is free when DeepSpeed has let go of all of them, before the next step."""
    param.data = flat.narrow(0, 0, param.ds_numel).view(param.ds_shape)
    param.ds_status = ZeroParamStatus.AVAILABLE
