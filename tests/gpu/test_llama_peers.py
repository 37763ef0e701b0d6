"""What people use beside us in a Llama: Liger Kernel, flex attention, FlashAttention's package, torch's kernels of the
kind. Losses follow bf16's with the same peer, every planned layer multiplies in FP8, and no graph breaks at a layer.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.gpu.llama_peers import Training, train

pytestmark = pytest.mark.gpu

pytest.importorskip("transformers")

NEEDS = {"flash_attention_2": "flash_attn", "liger": "liger_kernel"}
TORCH = {"torch_flash": SDPBackend.FLASH_ATTENTION, "torch_cudnn": SDPBackend.CUDNN_ATTENTION}
"""Kernels that torch's own attention is held to: without one of them it would fail, not take another."""

PEERS = ["sdpa", "eager", "flex_attention", "flash_attention_2", "liger", *TORCH]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("peer", PEERS)
def test_a_llama_with_a_peer(peer, compiled):
    """Against bf16 with the same peer, compiled the same way, where Liger Kernel breaks graphs by itself."""
    if peer in NEEDS and importlib.util.find_spec(NEEDS[peer]) is None:
        pytest.skip(f"{NEEDS[peer]} is not installed")
    how = {"liger": True} if peer == "liger" else {"attention": "sdpa" if peer in TORCH else peer}
    with sdpa_kernel(TORCH[peer]) if peer in TORCH else nullcontext():
        trained = alone if peer == "liger" else lambda **how: train("cuda", **how)
        bf16 = trained(fp8=False, compiled=compiled, **how)
        ours = trained(fp8=True, compiled=compiled, **how)
    assert not ours.lazy
    assert ours.losses == pytest.approx(bf16.losses, rel=0.02)
    assert ours.losses[-1] < ours.losses[0] - 0.05
    assert ours.breaks == bf16.breaks if peer in NEEDS else not ours.breaks


def alone(**how: Any) -> Training:
    """In a process of its own: Liger Kernel imports PEFT, and PEFT Transformer Engine, whose cuDNN does not load into a
    process in which torch's attention has loaded another.
    """
    command = [sys.executable, "-m", "tests.gpu.llama_peers", json.dumps(how)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240, check=False
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("TRAINING ")]
    assert done.returncode == 0 and found, done.stderr[-4000:]
    return Training(**json.loads(found[0].removeprefix("TRAINING ")))
