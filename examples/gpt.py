"""A GPT in PyTorch, and text that is on every machine: nothing here knows about DeepSpeed or about FP8.

The text is Python's own: the sources of the standard library and the topics of its help system, read as bytes. So the
vocabulary is 256, no tokeniser is needed, and nothing is downloaded.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Attention, then an MLP, each behind a LayerNorm and beside a residual path."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, length, 3 * self.heads, -1).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Decoder-only transformer; returns the mean cross entropy when targets are given, else the logits."""

    def __init__(self, vocabulary: int = 256, context: int = 128, width: int = 256, depth: int = 4, heads: int = 4):
        super().__init__()
        self.context = context
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # The residual path sums 2 * depth branches: keep its variance at one branch's.
        for block in self.blocks:
            for branch in (block.proj, block.down):
                nn.init.normal_(branch.weight, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


SKIPPED = {"site-packages", "dist-packages", "test", "tests", "encodings"}
"""Folders that are not of Python itself, or are tables rather than text."""

BLOCK_BYTES = 8192
HELD_OUT = 20
"""Every twentieth block of 8 KiB is held out, so that both parts come from all over the library."""


def text_of_python(limit_bytes: int = 8_000_000) -> bytes:
    """Sources of the standard library and the help topics, in a fixed order, cut at `limit_bytes`."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / "pydoc_data" / "topics.py", *sorted(library.glob("*.py")), *sorted(library.glob("*/*.py"))]
    chunks, size = [], 0
    for file in files:
        if SKIPPED & set(file.parts) or not file.is_file():
            continue
        chunk = file.read_bytes()
        chunks.append(chunk)
        size += len(chunk)
        if size >= limit_bytes:
            break
    return b"".join(chunks)[:limit_bytes]


class Text:
    """Windows of the text; a batch is a function of (seed, step, rank) alone, so a resumed run sees what it would
    have.
    """

    def __init__(self, context: int, seed: int):
        data = torch.frombuffer(bytearray(text_of_python()), dtype=torch.uint8)
        blocks = data[: len(data) // BLOCK_BYTES * BLOCK_BYTES].view(-1, BLOCK_BYTES)
        held_out = torch.arange(len(blocks)) % HELD_OUT == HELD_OUT - 1
        self.train, self.held_out = blocks[~held_out].flatten(), blocks[held_out].flatten()
        self.context, self.seed = context, seed

    def batch(self, step: int, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random training windows [size, context] and the same ones shifted by one byte."""
        generator = torch.Generator().manual_seed(hash((self.seed, step, rank)) & 0x7FFFFFFF)
        starts = torch.randint(len(self.train) - self.context - 1, (size,), generator=generator)
        return self._windows(self.train, starts)

    def evaluation(self, rank: int, world_size: int, windows: int, size: int):
        """Batches of `size` of this rank's share of `windows` held-out windows, spread evenly; equal on every run."""
        last = len(self.held_out) - self.context - 1
        starts = torch.linspace(0, last, windows).long()[rank::world_size]
        for chunk in starts.split(size):
            yield self._windows(self.held_out, chunk)

    def _windows(self, data: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.stack([data[start : start + self.context + 1] for start in starts.tolist()]).long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
