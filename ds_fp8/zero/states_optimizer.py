"""Our Adam in place of DeepSpeed's or the client's, with their hyper-parameters.

The `optimizer` section stays as it is. Its keys fall into three kinds: numbers that mean the same here (`lr`, `betas`,
`eps`, `weight_decay`, `bias_correction`, `adam_w_mode`), choices of an implementation that ours replaces (`torch_adam`,
`foreach`, `fused`), and what ours cannot do, which is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist

from .. import optim
from ..errors import PlanError
from .states_client import ClientStates
from .touched import touched

TOUCHED = {
    "Engine": touched(
        reads="optimizer_name optimizer_params seq_data_parallel_group super_offload zero_elastic_checkpoint zero_offload_optimizer zero_optimization_stage"
    ),
    "ZenFlow": touched(reads="zenflow"),
}

IMPLEMENTATION_KEYS = {"torch_adam", "foreach", "fused", "capturable", "differentiable", "set_grad_none"}
"""Keys that choose between implementations of the same numbers."""

SEED = 0x5EED
"""Where stochastic rounding starts; each partition adds its own number, replicas share it. Kept in checkpoints."""


def build_optimizer(engine: Any, model_parameters: Iterable[Any], plan: Any) -> Any:
    """ScaledAdam or ScaledAdamW from DeepSpeed's `optimizer` section; PlanError for any other type or key."""
    name = (engine.optimizer_name() or "").lower()
    if name not in ("adam", "adamw"):
        raise PlanError(
            f"optimizer/type is {engine.optimizer_name()!r}: msamp keeps the states of Adam and AdamW.\n"
            "  Use one of these, or remove the msamp section."
        )
    arguments = dict(engine.optimizer_params() or {})
    # DeepSpeed's rule: the name Adam means AdamW too, unless adam_w_mode says otherwise.
    decoupled = name == "adamw" or bool(arguments.pop("adam_w_mode", True))
    arguments.pop("adam_w_mode", None)
    for key in IMPLEMENTATION_KEYS:
        arguments.pop(key, None)
    for key in ("amsgrad", "maximize"):
        if arguments.pop(key, False):
            raise PlanError(f"optimizer/params/{key}: msamp has no such Adam. Remove the key, or the msamp section.")
    if arguments.pop("fp32_optimizer_states", None) is not None:
        raise PlanError(
            "optimizer/params/fp32_optimizer_states: with msamp the formats of states are msamp/exp_avg and exp_avg_sq.\n"
            "  Remove the key; fp32 states are exp_avg: fp32, exp_avg_sq: fp32."
        )
    if "max_grad_norm" in arguments:
        raise PlanError("optimizer/params/max_grad_norm: write gradient_clipping at the top of the file instead.")
    cls = optim.ScaledAdamW if decoupled else optim.ScaledAdam
    unknown = sorted(set(arguments) - set(inspect.signature(cls).parameters))
    if unknown:
        raise PlanError(f"optimizer/params: {', '.join(unknown)} unknown to Adam; remove or correct.")
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    return cls(model_parameters, **arguments, **_ours(engine, plan))


def take_over(engine: Any, client_optimizer: Any, model_parameters: Any, plan: Any) -> tuple[Any, ClientStates]:
    """Our Adam with a client's parameters and hyper-parameters, and the states to cut to ZeRO's partitions.

    client_optimizer  an optimizer, or a callable that makes one of `model_parameters`
    The parameter groups stay the client's own dicts, so a scheduler that was built on them goes on working. In stage 0,
    where the parameters themselves are stepped, the states have been taken already.
    """
    client = client_optimizer
    if not isinstance(client, torch.optim.Optimizer) and callable(client):
        client = client(model_parameters)
    ours = optim.take_over(client, **_ours(engine, plan), with_state=False)
    if ours is client and ours.formats() != _formats(plan):
        raise PlanError(
            f"optimizer {type(client).__name__} was built with {ours.formats()}, the msamp section says {_formats(plan)}.\n"
            "  Give it the same level, or pass torch.optim.AdamW and let msamp choose."
        )
    given = ClientStates.of(client, engine)
    if int(engine.zero_optimization_stage()) > 0:
        # ZeRO steps partitions: states of whole parameters would stay behind in memory.
        ours.state.clear()
    elif ours is not client:
        for param, state in given.states.items():
            ours.import_fp32(param, **state)
    return ours, given


def _formats(plan: Any) -> dict[str, str]:
    return {name: getattr(plan.optim.level, name) for name in ("exp_avg", "exp_avg_sq", "master", "rounding")}


def _ours(engine: Any, plan: Any) -> dict[str, Any]:
    return {"level": plan.optim.level, "base_dtype": plan.optim.base_dtype, "seed": _seed(engine)}


def _seed(engine: Any) -> int:
    """Partitions of one tensor round with different bits; replicas (stage 0) with the same ones."""
    if int(engine.zero_optimization_stage()) == 0:
        return SEED
    return SEED + dist.get_rank(group=engine.seq_data_parallel_group)


def refuse_unsupported(engine: Any) -> None:
    """Parts of DeepSpeed that own the optimizer step themselves: refused before anything is built."""
    offload = engine.zero_offload_optimizer()
    device = getattr(getattr(offload, "device", None), "value", None)
    if device == "nvme":
        raise PlanError(
            "zero_optimization/offload_optimizer/device is nvme: DeepSpeed's swapper moves states that have the size and"
            " dtype of the master; codes and their scales have neither.\n"
            "  Use device cpu (states are a third of fp32's there), or remove the msamp section."
        )
    reasons = {
        "ZenFlow": (getattr(engine, "zenflow", False), "it steps selected columns with an optimizer of its own"),
        "SuperOffload": (_asks(engine, "super_offload"), "it steps in a process of its own, with DeepSpeed's CPUAdam"),
        "offload_optimizer/ratio below 1": (
            offload is not None and getattr(offload, "ratio", 1.0) < 1.0,
            "the part that stays on the device is stepped by torch's AdamW",
        ),
        "compile/deepcompile": (_asks(engine, "compile_deepcompile"), "its passes schedule fp32 states themselves"),
        "elastic_checkpoint in stage 3": (
            int(engine.zero_optimization_stage()) == 3 and _asks(engine, "zero_elastic_checkpoint"),
            "DeepSpeed has dropped it; use universal checkpoints",
        ),
    }
    for name, (present, reason) in reasons.items():
        if present:
            raise PlanError(f"msamp with {name}: {reason}.\n  Turn one of the two off.")


def _asks(engine: Any, name: str) -> bool:
    ask = getattr(engine, name, None)
    return bool(ask()) if callable(ask) else bool(ask)
