"""Our optimizer in place of DeepSpeed's or the client's, with their hyper-parameters.

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
from ..algorithms import ALGORITHMS, REFUSED_OPTIONS, labels
from ..errors import PlanError
from ..optim.algorithm import refuse_options
from ..plan import Plan
from .states_client import ClientStates
from .touched import touched

TOUCHED = {
    "Engine": touched(reads="optimizer_name optimizer_params seq_data_parallel_group zero_optimization_stage"),
}

IMPLEMENTATION_KEYS = {"torch_adam", "foreach", "fused", "set_grad_none"}
"""Keys that choose between implementations of the same numbers."""


def build_optimizer(engine: Any, model_parameters: Iterable[Any], plan: Plan) -> Any:
    """ScaledAdam, ScaledAdamW or ScaledLion from DeepSpeed's `optimizer` section; PlanError for any other type or
    key.
    """
    name = (engine.optimizer_name() or "").lower()
    if name not in optim.ALGORITHMS:
        raise PlanError(
            f"optimizer/type is {engine.optimizer_name()!r}: msamp keeps the states of {labels()}.\n"
            "  Use one of these, or remove the msamp section."
        )
    arguments = dict(engine.optimizer_params() or {})
    # DeepSpeed's rule: the name Adam means AdamW too, unless adam_w_mode says otherwise.
    if name == "adam" and arguments.pop("adam_w_mode", True):
        name = "adamw"
    arguments.pop("adam_w_mode", None)
    for key in IMPLEMENTATION_KEYS:
        arguments.pop(key, None)
    refuse_options(arguments, "optimizer/params")
    for key in REFUSED_OPTIONS:
        arguments.pop(key, None)
    if arguments.pop("fp32_optimizer_states", None) is not None:
        raise PlanError(
            "optimizer/params/fp32_optimizer_states: with msamp the formats of states are msamp/exp_avg and "
            "exp_avg_sq.\n"
            "  Remove the key; fp32 states are exp_avg: fp32, exp_avg_sq: fp32."
        )
    if "max_grad_norm" in arguments:
        raise PlanError("optimizer/params/max_grad_norm: write gradient_clipping at the top of the file instead.")
    cls = optim.ALGORITHMS[name]
    unknown = sorted(set(arguments) - set(inspect.signature(cls).parameters))
    if unknown:
        raise PlanError(
            f"optimizer/params: {', '.join(unknown)} unknown to {ALGORITHMS[name].label}; remove or correct."
        )
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    return cls(model_parameters, **arguments, **_ours(engine, plan))


def replace_client_optimizer(
    engine: Any, client_optimizer: Any, model_parameters: Any, plan: Plan
) -> tuple[Any, ClientStates]:
    """Our Adam with a client's parameters and hyper-parameters, and the states to cut to ZeRO's partitions.

    client_optimizer  an optimizer, or a callable that makes one of `model_parameters`
    The parameter groups stay the client's own dicts, so a scheduler that was built on them goes on working. In stage 0,
    where the parameters themselves are stepped, the states have been taken already.
    """
    client = client_optimizer
    if not isinstance(client, torch.optim.Optimizer) and callable(client):
        client = client(model_parameters)
    ours = optim.replace_client_optimizer(client, **_ours(engine, plan), with_state=False)
    if ours is client and ours.formats() != _formats(plan, ours.formats()):
        raise PlanError(
            f"optimizer {type(client).__name__} was built with {ours.formats()}, the msamp section says "
            f"{_formats(plan, ours.formats())}.\n"
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


def _formats(plan: Plan, names: Iterable[str]) -> dict[str, str]:
    assert plan.optim is not None
    return {name: getattr(plan.optim.level, name) for name in names}


def _ours(engine: Any, plan: Plan) -> dict[str, Any]:
    assert plan.optim is not None
    return {"level": plan.optim.level, "base_dtype": plan.optim.base_dtype, "seed": _seed(engine)}


def _seed(engine: Any) -> int:
    """Partitions of one tensor round with different bits; replicas (stage 0) with the same ones."""
    if int(engine.zero_optimization_stage()) == 0:
        return optim.SEED
    return optim.SEED + dist.get_rank(group=engine.seq_data_parallel_group)
