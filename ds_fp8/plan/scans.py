"""The matrix products of layers that carry a state from token to token instead of attending: in chunks of the sequence.

    Mamba-1                           per token and channel  N
                                      reading the state; the rest multiplies by element
    Mamba-2 (state-space duality)     per token and head  chunk * (N + P) + 2 * N * P + N * P * (chunks + 1)^2 / S
                                      scores inside a chunk, their product with the inputs, into the state, out of it;
                                      from chunk to chunk
    linear attention (lightning       per token and head  chunk * (K + V) + 2 * K * V
    attention, mLSTM)                 scores inside a chunk, their product with the values, into the state, out of it
    delta rule (Gated DeltaNet, KDA)  per token and head  chunk * (3 * K + 2 * V) + 3 * K * V
                                      keys with keys, queries with keys, both halves of the WY form, weights with
                                      values; correction, output and update of the state

N width of the state, P of a head, K and V of a head's keys and values, S tokens of a sequence. RWKV and the gated
linear recurrence (RG-LRU) multiply by element: they have no such product. A layer is known by the parameter, buffer or
gate of its decay (`STATE`) and by what it says of its sizes.
Sources: Dao and Gu, arXiv 2405.21060, section 6; Yang et al., arXiv 2406.06484, section 3; Beck et al., arXiv
2405.04517.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

DELTA_CHUNK = 64
"""Tokens per chunk of the kernels for the delta rule; no configuration says it."""

STATE = ("A_log", "time_decay", "slope_rate", "fgate_preact", "ifgate_preact", "recurrent_param")
"""The decay of a state: of Mamba and the delta rule, RWKV, lightning attention, mLSTM (a forget gate), RG-LRU."""


def has_state(module: nn.Module) -> bool:
    """Whether the module, or a gate right below it, holds the decay of a state."""
    return any(
        name in members
        for holder in (module, *module.children())
        for members in (holder._parameters, holder._buffers, holder._modules)
        for name in STATE
    )


def scans(model: nn.Module, length: int) -> Iterator[tuple[str, str, float]]:
    """(fqn, label, multiply-adds per token) of every layer with a state that multiplies matrices."""
    for fqn, module in model.named_modules():
        if not has_state(module) or not {"out_proj", "o_proj"} & set(module._modules):
            continue
        if sizes := _integers(module, "num_heads", "head_dim", "ssm_state_size", "chunk_size"):
            heads, width, state, chunk = sizes
            between = (-(-length // chunk) + 1) ** 2 / length
            yield fqn, "state-space scan", heads * (chunk * (state + width) + (2 + between) * state * width)
        elif sizes := _integers(module, "intermediate_size", "ssm_state_size"):
            yield fqn, "state-space scan", sizes[0] * sizes[1]
        elif sizes := _integers(module, "num_v_heads", "head_k_dim", "head_v_dim"):
            yield fqn, "linear attention", _delta(*sizes)
        elif sizes := _integers(module, "num_attention_heads", "head_dim", "block_size"):
            yield fqn, "linear attention", _linear(sizes[0], sizes[1], sizes[1], min(sizes[2], length))
        elif sizes := _mlstm(module):
            yield fqn, "linear attention", _linear(*sizes)
        elif sizes := _integers(module, "num_heads", "head_dim"):
            yield fqn, "linear attention", _delta(sizes[0], sizes[1], sizes[1])


def _delta(heads: int, key: int, value: int) -> int:
    return heads * (DELTA_CHUNK * (3 * key + 2 * value) + 3 * key * value)


def _linear(heads: int, key: int, value: int, chunk: int) -> int:
    return heads * (chunk * (key + value) + 2 * key * value)


def _mlstm(module: nn.Module) -> tuple[int, ...]:
    """(heads, keys, values of a head, chunk) of an mLSTM, whose configuration says heads and chunk."""
    found = _integers(getattr(module, "config", None), "num_heads", "chunk_size")
    widths = _integers(module, "qk_dim", "v_dim")
    if not found or not widths:
        return ()
    return found[0], widths[0] // found[0], widths[1] // found[0], found[1]


def _integers(module: Any, *names: str) -> tuple[int, ...]:
    """The attributes of these names; () unless all of them are whole numbers above zero."""
    values = [value for name in names if isinstance(value := getattr(module, name, None), int) and value > 0]
    return tuple(values) if len(values) == len(names) else ()
