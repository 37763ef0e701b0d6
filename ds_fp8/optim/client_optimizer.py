"""A client's Adam becomes ours: same parameters, groups, hyper-parameters and state, other bytes.

Recognised by class, because two optimizers that share a name of a base class may still compute different things:

    torch.optim.Adam, torch.optim.AdamW     exactly these, no subclasses with a step of their own
    FusedAdam, DeepSpeedCPUAdam             DeepSpeed's; `adam_w_mode` says which Adam
    FusedAdam                               apex's and Transformer Engine's; the same attribute

The parameter groups stay the client's own dicts, so a scheduler built on them goes on working. Anything else is
refused by name.

DeepSpeed's FusedAdam (0.19.8) counts the steps of a group in the state of the group's last parameter alone; the others
stay at 0. So for an optimizer of that name the step of a group is the largest found in it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import PlanError
from ..levels import Level
from .algorithm import refuse_options
from .codecs import MOMENTS
from .scaled_adam import ScaledAdam, ScaledAdamW

_WITH_ADAM_W_MODE = {
    ("deepspeed", "FusedAdam"),
    ("deepspeed", "DeepSpeedCPUAdam"),
    ("apex", "FusedAdam"),
    ("transformer_engine", "FusedAdam"),
}
"""(top-level package, class name) of optimizers with an `adam_w_mode`."""

_NUMBERS = ("lr", "betas", "eps", "weight_decay", "bias_correction")


def take_over(
    client: torch.optim.Optimizer,
    *,
    level: Level | str = "O2",
    base_dtype: str | None = None,
    seed: int = 0,
    with_state: bool = True,
) -> ScaledAdam:
    """ScaledAdam or ScaledAdamW in place of `client`; PlanError, naming the class, if it is neither Adam nor AdamW.

    with_state  False where ours will step other tensors than the client's (ZeRO's partitions): `client_states` then
                gives the caller what is to be cut
    """
    if isinstance(client, ScaledAdam):
        return client
    name = f"{type(client).__module__}.{type(client).__name__}"
    decoupled = _is_decoupled(client, name)
    if getattr(client, "amsgrad", False):
        raise PlanError(f"{name}: amsgrad is not available with FP8 states.\n  Remove amsgrad, or msamp.")
    for group in client.param_groups:
        refuse_options(group, name)
    if any(bool(group.get("decoupled_weight_decay", decoupled)) != decoupled for group in client.param_groups):
        raise PlanError(f"{name}: groups with and without decoupled weight decay in one optimizer.\n  Use one kind.")
    cls = ScaledAdamW if decoupled else ScaledAdam
    defaults = {key: client.defaults[key] for key in _NUMBERS if key in client.defaults}
    ours = cls(client.param_groups, **defaults, level=level, base_dtype=base_dtype, seed=seed)
    if with_state:
        for param, state in client_states(client).items():
            ours.import_fp32(param, **state)
    return ours


def client_states(client: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    """`step` and the moments (fp32) of every parameter that `client` has stepped; PlanError for a state of another kind."""
    found: dict[torch.Tensor, dict[str, Any]] = {}
    for group in client.param_groups:
        own = {param: _state_of(client, param, group) for param in group["params"] if client.state.get(param)}
        if type(client).__name__ == "FusedAdam" and own:
            step = max(state["step"] for state in own.values())
            own = {param: {**state, "step": step} for param, state in own.items()}
        found |= own
    return found


def _is_decoupled(client: torch.optim.Optimizer, name: str) -> bool:
    cls = type(client)
    if cls is torch.optim.AdamW:
        return True
    if cls is torch.optim.Adam:
        return bool(client.defaults.get("decoupled_weight_decay", False))
    if (cls.__module__.partition(".")[0], cls.__name__) in _WITH_ADAM_W_MODE:
        for attribute in ("adam_w_mode", "adamw_mode"):
            if hasattr(client, attribute):
                return bool(getattr(client, attribute))
    raise PlanError(
        f"optimizer {name}: msamp keeps the states of Adam and AdamW.\n"
        "  Use torch.optim.Adam or AdamW, or the optimizer section of DeepSpeed, or remove the msamp section."
    )


def _state_of(client: torch.optim.Optimizer, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Moments and step of one parameter that has been stepped."""
    if isinstance(client, ScaledAdam):
        return client.export_fp32(param, only=MOMENTS)
    state = client.state[param]
    step = state.get("step", group.get("step"))
    if step is None or not all(moment in state for moment in MOMENTS):
        name = f"{type(client).__module__}.{type(client).__name__}"
        raise PlanError(f"{name}: a state without {', '.join(MOMENTS)} or step, found {', '.join(map(str, state))}.")
    # Transformer Engine keeps fp16 and uint8 moments apart from their scales.
    unscaled = getattr(client, "get_unscaled_state", None)
    moments = {moment: unscaled(param, moment) if unscaled else state[moment] for moment in MOMENTS}
    return {"step": int(step), **{moment: value.detach().float() for moment, value in moments.items()}}
