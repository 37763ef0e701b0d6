"""Experts of transformers that compute by code of their own, outside of its registry of experts: how they compute.

Llama 4 gives every token to every expert, scaled by a gate that is zero unless it was chosen; JetMoE's
module is one product, and attention uses it too. Each is described as a user describes a class (`ds_fp8.experts`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import experts
from ..experts import Registration


def _llama4(module: Any, linear: Callable[..., torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
    """hidden_states [experts * tokens, hidden], all tokens for one expert after the other -> the same shape."""
    rows = hidden_states.reshape(-1, module.hidden_size)
    counts = torch.full(
        (module.num_experts,), rows.shape[0] // module.num_experts, dtype=torch.int64, device=rows.device
    )
    gate, up = linear("gate_up_proj", rows, counts).chunk(2, dim=-1)
    return linear("down_proj", up * module.act_fn(gate), counts)


def _jetmoe(
    module: Any, linear: Callable[..., torch.Tensor], inputs: torch.Tensor, expert_size: list[int]
) -> torch.Tensor:
    """inputs [rows, in], sorted by expert, and the rows of each -> [rows, out]."""
    return linear("weight", inputs, torch.tensor(expert_size, dtype=torch.int64, device=inputs.device))


KNOWN = {
    ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts"): Registration(
        {"gate_up_proj": "in_out", "down_proj": "in_out"}, _llama4, all_visit=True
    ),
    ("transformers.models.jetmoe.modeling_jetmoe", "JetMoeParallelExperts"): Registration(
        {"weight": "out_in"}, _jetmoe
    ),
}
"""By module and name of the class, so that nothing is imported."""


def registration_of(cls: type) -> Registration | None:
    """What a user registered for `cls`, or what is known of it here."""
    return experts.registration(cls) or KNOWN.get((cls.__module__, cls.__name__))
