"""The two matrix products inside attention, which belong to no layer: scores = Q @ K.T, and weights @ V.

Per token and module: S * (width of the queries + width of the values) multiply-adds, S the length of a sequence. All of
it is counted, as torch's FlopCounterMode does, though a causal kernel may skip half. A module is known to attend by the
names of its projections, or by the name of its class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .scans import has_state
from .shapes import matrix_of, shape_of

QUERY = ("q_b_proj", "q_proj", "query", "q", "to_q", "wq", "q_lin", "query_proj", "Wq", "linear_q")
"""Projections whose outputs are all heads of the queries; the second step of a low-rank one first (DeepSeek)."""

FUSED = ("qkv", "qkv_proj", "c_attn", "Wqkv", "query_key_value", "in_proj", "to_qkv", "attn_qkv", "W_pack")
OUTPUT = ("o_proj", "out_proj", "c_proj", "wo", "Wo", "proj", "dense", "to_out", "out_lin", "o", "out", "attn_proj")
"""Projections whose inputs are all heads of the values."""

ATTENDS = re.compile(r"attention|attn", re.IGNORECASE)

DEFAULT_LENGTH, LONGEST_LENGTH = 2048, 4096
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "block_size",
    "max_source_positions",
)


def attentions(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(fqn, width of the queries, width of the values) of every module that attends."""
    for fqn, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield fqn, module.embed_dim, module.embed_dim
            continue
        if has_state(module):  # scans.py
            continue
        children = {name: shape for name, child in module.named_children() if (shape := matrix_of(child))}
        value = next((children[name][1] for name in OUTPUT if name in children), None)
        query = next((children[name][0] for name in QUERY if name in children), None)
        if value is not None and {"k_proj", "v_proj"} <= set(children) and children["k_proj"] == children["v_proj"]:
            query = value  # a wider q_proj carries a gate beside the queries (Qwen3-Next)
        if query is None and any(name in children for name in FUSED):
            fused = next(children[name][0] for name in FUSED if name in children)
            query = value or fused // 3
        if query is None and ATTENDS.search(type(module).__name__) and len(children) > 1:
            query = value or max(columns for _, columns in children.values())
        if query is not None:
            yield fqn, query, value if value is not None else query


def sequence_length(model: nn.Module) -> int:
    """Tokens per sequence that the count assumes: what the model is made for, at most LONGEST_LENGTH."""
    config = getattr(model, "config", None)
    for part in (getattr(config, "text_config", None), config, model):
        if (patches := _patches(part)) is not None:
            return patches
        for name in (*LENGTHS, "context"):
            value = getattr(part, name, None)
            if isinstance(value, int) and value > 0:
                return min(value, LONGEST_LENGTH)
    return DEFAULT_LENGTH


def _patches(config: Any) -> int | None:
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(image, int) and isinstance(patch, int) and patch > 0:
        return (image // patch) ** 2 + 1
    return None


def packed_projection(module: nn.Module) -> tuple[int, int] | None:
    """[3 * width, width] of nn.MultiheadAttention's own parameter, in which no layer has a part."""
    weight = module._parameters.get("in_proj_weight") if isinstance(module, nn.MultiheadAttention) else None
    return None if weight is None else shape_of(weight)  # type: ignore[return-value]
