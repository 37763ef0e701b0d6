"""A client's Adam or Lion becomes ours: same parameters, groups, hyper-parameters and state, other bytes.

Recognised by class, because two optimizers that share a name of a base class may still compute different things:

    torch.optim.Adam, torch.optim.AdamW     exactly these, no subclasses with a step of their own
    FusedAdam, DeepSpeedCPUAdam             DeepSpeed's; `adam_w_mode` says which Adam
    FusedAdam                               apex's and Transformer Engine's; the same attribute
    FusedLion, DeepSpeedCPULion             DeepSpeed's

The parameter groups stay the client's own dicts, so a scheduler built on them goes on working. Anything else is
refused by name.

DeepSpeed's FusedAdam and FusedLion (0.19.8) count the steps of a group in the state of the group's last parameter
alone; the others stay at 0. So for optimizers of these names the step of a group is the largest found in it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..algorithms import labels
from ..errors import PlanError
from ..levels import Level
from .algorithm import refuse_options
from .scaled_adam import ScaledAdam, ScaledAdamW
from .scaled_lion import ScaledLion
from .scaled_optimizer import ScaledOptimizer

_WITH_ADAM_W_MODE = {
    ("deepspeed", "FusedAdam"),
    ("deepspeed", "DeepSpeedCPUAdam"),
    ("apex", "FusedAdam"),
    ("transformer_engine", "FusedAdam"),
}
"""(top-level package, class name) of optimizers with an `adam_w_mode`."""

_LIONS = {("deepspeed", "FusedLion"), ("deepspeed", "DeepSpeedCPULion")}

_COUNT_IN_ONE = ("FusedAdam", "FusedLion")
"""Classes that count the steps of a group in the state of its last parameter alone."""

_NUMBERS = ("lr", "betas", "eps", "weight_decay", "bias_correction")


def replace_client_optimizer(
    client: torch.optim.Optimizer,
    *,
    level: Level | str = "O2",
    base_dtype: str | None = None,
    seed: int = 0,
    with_state: bool = True,
) -> ScaledOptimizer:
    """ScaledAdam, ScaledAdamW or ScaledLion in place of `client`; PlanError, naming the class, if it is none of the
    three.

    with_state  False where ours will step other tensors than the client's (ZeRO's partitions): `client_states` then
                gives the caller what is to be cut
    """
    if isinstance(client, ScaledOptimizer):
        return client
    name = f"{type(client).__module__}.{type(client).__name__}"
    cls = _class_for(client, name)
    # DeepSpeed's CPUAdam keeps it in an attribute.
    for options in ({"amsgrad": getattr(client, "amsgrad", False)}, *client.param_groups):
        refuse_options(options, name)
    taken = inspect.signature(cls).parameters
    defaults = {key: client.defaults[key] for key in _NUMBERS if key in client.defaults and key in taken}
    ours = cls(client.param_groups, **defaults, level=level, base_dtype=base_dtype, seed=seed)
    if with_state:
        for param, state in client_states(client).items():
            ours.import_fp32(param, **state)
    return ours


def algorithm_of(client: Any) -> str | None:
    """The name in `ALGORITHMS` of what `client` computes; None for a callable that makes it, and for one that is
    refused.
    """
    if isinstance(client, ScaledOptimizer):
        return client.algorithm
    if not isinstance(client, torch.optim.Optimizer):
        return None
    try:
        return _class_for(client, type(client).__name__).algorithm
    except PlanError:
        return None


def client_states(client: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    """`step` and the moments (fp32) of every parameter that `client` has stepped; PlanError for a state of another
    kind.
    """
    found: dict[torch.Tensor, dict[str, Any]] = {}
    for group in client.param_groups:
        own = {param: _state_of(client, param, group) for param in group["params"] if client.state.get(param)}
        if type(client).__name__ in _COUNT_IN_ONE and own:
            step = max(state["step"] for state in own.values())
            own = {param: {**state, "step": step} for param, state in own.items()}
        found |= own
    return found


def _class_for(client: torch.optim.Optimizer, name: str) -> type[ScaledOptimizer]:
    """Our class for `client`; PlanError for a class that is none of those listed above."""
    cls, place = type(client), (type(client).__module__.partition(".")[0], type(client).__name__)
    decoupled: bool | None = None
    if place in _LIONS:
        return ScaledLion
    if cls is torch.optim.AdamW:
        decoupled = True
    elif cls is torch.optim.Adam:
        decoupled = bool(client.defaults.get("decoupled_weight_decay", False))
    elif place in _WITH_ADAM_W_MODE:
        modes = [getattr(client, mode) for mode in ("adam_w_mode", "adamw_mode") if hasattr(client, mode)]
        decoupled = bool(modes[0]) if modes else None
    if decoupled is None:
        raise PlanError(
            f"optimizer {name}: msamp keeps the states of {labels()}.\n"
            "  Use torch.optim.Adam or AdamW, or the optimizer section of DeepSpeed, or remove the msamp section."
        )
    if any(bool(group.get("decoupled_weight_decay", decoupled)) != decoupled for group in client.param_groups):
        raise PlanError(f"{name}: groups with and without decoupled weight decay in one optimizer.\n  Use one kind.")
    return ScaledAdamW if decoupled else ScaledAdam


def _state_of(client: torch.optim.Optimizer, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Moments and step of one parameter that has been stepped."""
    if isinstance(client, ScaledOptimizer):
        return client.export_fp32(param, only=client.moments)
    name = f"{type(client).__module__}.{type(client).__name__}"
    wanted = _class_for(client, name).moments
    state = client.state[param]
    step = state.get("step", group.get("step"))
    if step is None or not all(moment in state for moment in wanted):
        raise PlanError(f"{name}: a state without {', '.join(wanted)} or step, found {', '.join(map(str, state))}.")
    # Transformer Engine keeps fp16 and uint8 moments apart from their scales.
    unscaled = getattr(client, "get_unscaled_state", None)
    moments = {moment: unscaled(param, moment) if unscaled else state[moment] for moment in wanted}
    return {"step": int(step), **{moment: value.detach().float() for moment, value in moments.items()}}
