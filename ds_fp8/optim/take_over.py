"""A client's Adam becomes ours: same parameters, groups, hyper-parameters and state, other bytes.

Recognised by class, because two optimizers that share a name of a base class may still compute different things:

    torch.optim.Adam, torch.optim.AdamW     exactly these, no subclasses with a step of their own
    FusedAdam, DeepSpeedCPUAdam             DeepSpeed's; `adam_w_mode` says which Adam
    FusedAdam                               apex's and Transformer Engine's; the same attribute

The parameter groups stay the client's own dicts, so a scheduler built on them goes on working. Anything else is
refused by name.
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
    client: torch.optim.Optimizer, *, level: Level | str = "O2", base_dtype: str | None = None, seed: int = 0
) -> ScaledAdam:
    """ScaledAdam or ScaledAdamW in place of `client`; PlanError, naming the class, if it is neither Adam nor AdamW."""
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
    for group in client.param_groups:
        for param in group["params"]:
            _take_state(ours, param, client.state.get(param) or {}, group, name)
    return ours


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


def _take_state(ours: ScaledAdam, param: torch.Tensor, state: dict[str, Any], group: dict[str, Any], name: str) -> None:
    """Moments and step of one parameter, if it has been stepped."""
    if not state:
        return
    step = state.get("step", group.get("step"))
    if step is None or not all(moment in state for moment in MOMENTS):
        raise PlanError(f"{name}: a state without {', '.join(MOMENTS)} or step, found {', '.join(map(str, state))}.")
    moments = {moment: state[moment].detach().float() for moment in MOMENTS}
    ours.import_fp32(param, step=int(step), **moments)
