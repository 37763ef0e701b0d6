"""`gradient_wire_scope: auto`: where FP8 gradients win, asked of the machine.

Inside a node whose GPUs are joined by NVLink bytes cost less than casts: 1 GiB of bf16 gradients to their owners took
3.4 ms in FP8 and NCCL's own reduce-scatter 2.2 (two H100s, benchmarks/results/gpu_h100x2_202611.md). Over a network the
bytes decide. So:

    one node, NVLink               DeepSpeed's own reduction, in high precision
    several nodes, NVLink in each  inter_node: high precision inside a node, FP8 between nodes
    everything else                all: FP8 between all ranks
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator


def choose_scope(*, node_name: str | None = None, nvlink: bool | None = None) -> tuple[str, str]:
    """(`none`, `inter_node` or `all`, the reason in words). Collective over the world; the same on all ranks.

    node_name, nvlink   facts about this rank, asked of the machine when None
    """
    if get_accelerator().device_name() != "cuda" and nvlink is None:
        return "all", "no NVLink on this device"
    if dist.get_world_size() == 1:
        return "all", "one rank"
    mine = (node_name or socket.gethostname(), has_nvlink() if nvlink is None else nvlink)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    names = [name for name, _ in everyone]
    sizes = {name: names.count(name) for name in names}
    if max(sizes.values()) == 1:
        return "all", f"{len(sizes)} nodes of one rank"
    if not all(linked for _, linked in everyone):
        return "all", "no NVLink between the GPUs of a node"
    if len(sizes) == 1:
        return "none", f"one node, NVLink between its {len(names)} GPUs: bytes cost less than casts"
    if len(set(sizes.values())) > 1:
        return "all", f"{len(sizes)} nodes with unequal numbers of ranks"
    return "inter_node", f"{len(sizes)} nodes of {max(sizes.values())} GPUs with NVLink"


def has_nvlink() -> bool:
    """Whether this rank's GPU has an active NVLink; False where nobody can tell."""
    device = torch.cuda.current_device()
    with contextlib.suppress(Exception):  # whatever the driver's library says: it is a hint, not a need
        import pynvml

        pynvml.nvmlInit()
        handle = torch.cuda._get_pynvml_handler(device)
        links = range(getattr(pynvml, "NVML_NVLINK_MAX_LINKS", 18))
        return any(_is_active(pynvml, handle, link) for link in links)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        command = ["nvidia-smi", "nvlink", "--status", "-i", f"GPU-{uuid.removeprefix('GPU-')}"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return "GB/s" in found.stdout
    return False


def _is_active(pynvml: Any, handle: Any, link: int) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetNvLinkState(handle, link))
    except pynvml.NVMLError:
        return False
