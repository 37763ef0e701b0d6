"""The two matrix products inside attention, which belong to no layer: scores = Q @ K.T, and weights @ V.

Per token and module: S * (width of the queries + width of the values) multiply-adds, S the length of a sequence, or of
a window where attention stays inside of one (Swin). All of it is counted, as torch's FlopCounterMode does, though a
causal kernel may skip half. A module is known to attend by the names of its projections, or by the name of its class.
An indexer (DeepSeek-V3.2) has scores only; differential attention attends twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .scans import has_state
from .shapes import matrix_of, own_parameter, shape_of

QUERY = ("q_b_proj", "q_proj", "query", "q", "to_q", "wq", "q_lin", "query_proj", "Wq", "linear_q")
"""Projections whose outputs are all heads of the queries; the second step of a low-rank one first (DeepSeek)."""

FUSED = ("qkv", "qkv_proj", "c_attn", "Wqkv", "query_key_value", "in_proj", "to_qkv", "attn_qkv", "W_pack")
OUTPUT = ("o_proj", "out_proj", "c_proj", "wo", "Wo", "proj", "dense", "to_out", "out_lin", "o", "out", "attn_proj")
"""Projections whose inputs are all heads of the values."""

ATTENDS = re.compile(r"attention|attn", re.IGNORECASE)
INDEXER = re.compile(r"indexer", re.IGNORECASE)
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
HEAD_WIDTHS = ("head_dim", "d_head", "dim_head", "head_size")

DEFAULT_LENGTH, LONGEST_LENGTH = 2048, 4096
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "block_size",
    "max_source_positions",
    "context_length",
)


def attentions(model: nn.Module, length: int) -> Iterator[tuple[str, int]]:
    """(fqn, multiply-adds per token) of every module that attends, in sequences of `length` tokens."""
    for fqn, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield fqn, 2 * length * module.embed_dim
        elif not has_state(module) and (widths := _widths(module)):  # a state: scans.py
            yield fqn, _span(module, length) * sum(widths)


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """(width of the queries, width of the values), None for a module that does not attend."""
    children = {name: shape for name, child in module.named_children() if (shape := _matrix_in(child))}
    by_name = bool(ATTENDS.search(type(module).__name__))
    own = math.prod(heads_of(module) or (0,))
    value = next((children[name][1] for name in OUTPUT if name in children), None)
    query = next((children[name][0] for name in QUERY if name in children), None)
    if INDEXER.search(type(module).__name__):
        query = query or next((children[name][0] for name in ("wq_b", "index_qk_proj") if name in children), None)
        return None if query is None else (query, 0)
    if value is not None and {"k_proj", "v_proj"} <= set(children) and children["k_proj"] == children["v_proj"]:
        query = value  # a wider q_proj carries a gate beside the queries (Qwen3-Next)
    fused = next((name for name in FUSED if name in children), None)
    if query is None and fused is not None and (fused != "in_proj" or by_name or own):
        query = value or children[fused][0] // 3  # other layers have an in_proj too (LFM2's convolutions)
    if query is None and by_name:
        several = len(children) > 1
        query = (value if several else None) or own or (max(shape[1] for shape in children.values()) if several else 0)
    if not query:
        return None
    twice = 2 if "lambda_q1" in module._parameters else 1
    return twice * query, twice * (query if value is None else value)


def _matrix_in(child: nn.Module) -> tuple[int, int] | None:
    """The matrix of a layer, or of the only one that a wrapper holds."""
    if (shape := matrix_of(child)) is not None:
        return shape
    inside = [shape for module in child.modules() if (shape := matrix_of(module)) is not None]
    return inside[0] if len(inside) == 1 else None


def heads_of(module: nn.Module) -> tuple[int, int] | None:
    """(heads, width of a head) of the queries, as the module itself says; None where it says nothing."""
    heads, width = (
        next((value for name in names if isinstance(value := getattr(module, name, None), int) and value > 0), None)
        for names in (HEADS, HEAD_WIDTHS)
    )
    return (heads, width) if heads is not None and width is not None else None


def _span(module: nn.Module, length: int) -> int:
    """Tokens that a token attends to: all, or those of a window [height, width] (Swin)."""
    for holder in (module, *module.children()):
        if isinstance(getattr(holder, "window_size", None), (tuple, list)) and (sides := _sides(holder.window_size)):
            return min(length, sides[0] * sides[1])
    return length


def sequence_length(model: nn.Module) -> int:
    """Tokens per sequence that the count assumes: what the model is made for, at most LONGEST_LENGTH."""
    config = getattr(model, "config", None)
    for part in (getattr(config, "text_config", None), config, getattr(config, "vision_config", None), model):
        if (patches := _patches(part)) is not None:
            return patches
        for name in (*LENGTHS, "context"):
            value = getattr(part, name, None)
            if isinstance(value, int) and value > 0:
                return min(value, LONGEST_LENGTH)
    return DEFAULT_LENGTH


def _patches(config: Any) -> int | None:
    """Patches of an image and one token for all of it, or patches of a time series."""
    image, patch = _sides(getattr(config, "image_size", None)), _sides(getattr(config, "patch_size", None))
    if image and patch:
        return (image[0] // patch[0]) * (image[1] // patch[1]) + 1
    names = ("context_length", "patch_length", "patch_stride")
    points, patch_length, stride = (getattr(config, name, None) for name in names)
    if isinstance(points, int) and isinstance(patch_length, int) and isinstance(stride, int) and stride > 0:
        return max(points - patch_length, 0) // stride + 1
    return None


def _sides(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size that is one number or both."""
    both = (size, size) if isinstance(size, int) else size
    if isinstance(both, (tuple, list)) and len(both) == 2 and all(isinstance(side, int) and side > 0 for side in both):
        return both[0], both[1]
    return None


def packed_projection(module: nn.Module) -> tuple[int, int] | None:
    """[3 * width, width] of nn.MultiheadAttention's own parameter, in which no layer has a part."""
    weight = own_parameter(module, "in_proj_weight") if isinstance(module, nn.MultiheadAttention) else None
    return None if weight is None else shape_of(weight)  # type: ignore[return-value]
