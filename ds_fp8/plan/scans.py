"""The matrix products of layers that carry a state from token to token instead of attending: in chunks of the sequence.

    Mamba-2 (state-space duality)     per token and head  chunk * (N + P) + 2 * N * P
                                      scores inside a chunk, their product with the inputs, into the state, out of it
    delta rule (Gated DeltaNet, KDA)  per token and head  chunk * (3 * K + 2 * V) + 3 * K * V
                                      keys with keys, queries with keys, both halves of the WY form, weights with
                                      values; correction, output and update of the state

N width of the state, P of a head, K and V of a head's keys and values. Mamba-1 multiplies by element: it has no such
product. A layer is known by its parameter `A_log` (the logarithm of its decay) and by what it says of its sizes.
Sources: Dao and Gu, arXiv 2405.21060, section 6; Yang et al., arXiv 2406.06484, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

DELTA_CHUNK = 64
"""Tokens per chunk of the kernels for the delta rule; no configuration says it."""


def has_state(module: nn.Module) -> bool:
    """Whether the module, or a gate right below it, holds the decay of a state."""
    return any("A_log" in holder._parameters for holder in (module, *module.children()))


def scans(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """(fqn, label, multiply-adds per token) of every layer with a state that multiplies matrices."""
    for fqn, module in model.named_modules():
        if not has_state(module) or not {"out_proj", "o_proj"} & set(module._modules):
            continue
        if sizes := _integers(module, "num_heads", "head_dim", "ssm_state_size", "chunk_size"):
            heads, width, state, chunk = sizes
            yield fqn, "state-space scan", heads * (chunk * (state + width) + 2 * state * width)
        elif hasattr(module, "ssm_state_size"):
            continue  # Mamba-1
        elif sizes := _integers(module, "num_v_heads", "head_k_dim", "head_v_dim"):
            yield fqn, "linear attention", _delta(*sizes)
        elif sizes := _integers(module, "num_heads", "head_dim"):
            yield fqn, "linear attention", _delta(sizes[0], sizes[1], sizes[1])


def _delta(heads: int, key: int, value: int) -> int:
    return heads * (DELTA_CHUNK * (3 * key + 2 * value) + 3 * key * value)


def _integers(module: Any, *names: str) -> tuple[int, ...]:
    """The attributes of these names; () unless all of them are whole numbers above zero."""
    values = [value for name in names if isinstance(value := getattr(module, name, None), int) and value > 0]
    return tuple(values) if len(values) == len(names) else ()
