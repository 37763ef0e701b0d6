"""DeepSpeed's own entries, looked at before DeepSpeed takes them: it reads them one by one while it changes the engine.

A counter that is text, a learning rate that is None, a moment of another size: each of them is noticed after the
weights were overwritten, or in the next step, with an error that names no file. Kinds and sizes are compared with what
this engine holds itself. A number of the right kind is believed: nothing in the file says what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    BASE_OPTIMIZER_STATE_STEP,
    CLIP_GRAD,
    DS_VERSION,
    FP32_FLAT_GROUPS,
    GROUP_PADDINGS,
    LOSS_SCALER,
    OPTIMIZER_STATE_DICT,
)

from ..errors import CheckpointError
from ..zero.touched import touched
from .values import check_tensor, is_count, is_finite_number, is_negative, is_step, is_version, same_kind, shown

TOUCHED = {
    "Engine": touched(reads="lr_scheduler"),
    "AnyWrapper": touched(reads="param_groups"),
    "ZeroStage12": touched(reads="round_robin_bit16_padding"),
    "ZeroStage3": touched(reads="fp32_partitioned_groups_flat swap_optimizer"),
}

PARAM_ALIGNMENT_PADDINGS = "param_alignment_paddings"  # DeepSpeed 0.18.0 has no name for it
NOT_NEGATIVE = ("lr", "eps", "weight_decay")
OWN_MASTERS = ("fp8_masters", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
FLAGS = ("foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad")
"""Of torch's optimizers: true or false; the first two also None, for torch's own choice."""

ADAMS = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")
STATES = "states"
"""Key of our entries under which stands how many states the optimizer had."""

LOSS_SCALE_HISTORY = ("last_overflow_iter", "scale_factor", "scale_window")
SIZED_STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""States with one value for each element of the master."""


def check_counters(state: dict[str, Any], where: str) -> None:
    """Raise CheckpointError for a model file whose counters DeepSpeed could not go on with."""
    for key in ("global_steps", "skipped_steps", "dp_world_size", "mp_world_size"):
        if key not in state:
            raise CheckpointError(f"{where}: {key} is missing: no model file of DeepSpeed, or damaged.")
    for key in ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size"):
        least = int(key.endswith("world_size"))
        if key in state and not is_count(state[key], least):
            raise CheckpointError(
                f"{where}: {key} is {shown(state[key])}, expected a whole number of at least {least}; it is damaged."
            )


def check_scheduler(engine: Any, saved: Any, where: str) -> None:
    """Raise CheckpointError if the state of a learning-rate scheduler is none that the engine's could take."""
    scheduler = engine.lr_scheduler
    if scheduler is None or not hasattr(scheduler, "state_dict"):
        return
    if saved is None:
        raise CheckpointError(
            f"{where}: no state of a learning-rate scheduler, and this job has one ({type(scheduler).__name__}).\n"
            "  Load it with load_lr_scheduler_states=False; the scheduler then starts anew."
        )
    ours, torchs = (type(scheduler).__module__.startswith(f"{name}.") for name in ("deepspeed", "torch"))
    if not ours and not torchs:  # of a script: what it keeps, and in which kinds, it alone knows
        return
    own = scheduler.state_dict()
    if not isinstance(saved, dict) or (ours and own.keys() - saved.keys()):
        raise CheckpointError(f"{where}: lr_scheduler is not the state of a {type(scheduler).__name__}.")
    for key, value in own.items():
        if key in saved and not same_kind(saved[key], value, finite=False):
            raise CheckpointError(
                f"{where}: lr_scheduler/{key} is {shown(saved[key])}, a {type(scheduler).__name__} keeps "
                f"{shown(value)} there; it is damaged, or another scheduler's."
            )


def check_shard(shard: dict[str, Any], optimizer: Any, flats: Any, where: str) -> None:
    """Raise CheckpointError for an optimizer shard of ZeRO that DeepSpeed would stumble over.

    optimizer  the engine's, DeepSpeed's wrapper
    flats      the fp32 masters in the shard
    """
    if not isinstance(flats, (list, tuple)) or not all(isinstance(flat, torch.Tensor) for flat in flats):
        raise CheckpointError(f"{where}: the fp32 masters are no list of tensors; it is damaged.")
    if (DS_VERSION in shard or FP32_FLAT_GROUPS not in shard) and not is_version(shard.get(DS_VERSION)):
        raise CheckpointError(f"{where}: {DS_VERSION} is {shown(shard.get(DS_VERSION))}, no version of DeepSpeed.")
    own_paddings = getattr(optimizer, "round_robin_bit16_padding", None)
    if PARAM_ALIGNMENT_PADDINGS in shard and own_paddings is not None:
        saved = shard[PARAM_ALIGNMENT_PADDINGS]
        if not isinstance(saved, list) or repr(saved) != repr(own_paddings):
            raise CheckpointError(
                f"{where}: {PARAM_ALIGNMENT_PADDINGS} is {shown(saved)}, this job's is {shown(own_paddings)}.\n"
                "  Set zero_optimization/parameter_alignment as it was when the checkpoint was saved, or load the "
                "weights alone with load_optimizer_states=False."
            )
    if CLIP_GRAD in shard and (not is_finite_number(shard[CLIP_GRAD]) or shard[CLIP_GRAD] < 0):
        raise CheckpointError(f"{where}: {CLIP_GRAD} is {shown(shard[CLIP_GRAD])}, expected a number from 0 on.")
    for key in ("overflow", "dynamic_loss_scale", LOSS_SCALER):
        if FP32_FLAT_GROUPS in shard and key not in shard:
            raise CheckpointError(f"{where}: {key} is missing; it is damaged.")
        if key != LOSS_SCALER and key in shard and not isinstance(shard[key], (bool, int, torch.Tensor)):
            raise CheckpointError(f"{where}: {key} is {shown(shard[key])}, expected true or false.")
    if LOSS_SCALER in shard and not hasattr(shard[LOSS_SCALER], "cur_scale"):
        raise CheckpointError(f"{where}: {LOSS_SCALER} is {shown(shard[LOSS_SCALER])}, no loss scaler of DeepSpeed.")
    base = saved_optimizer(shard)
    shapes = _flat_shapes(shard, optimizer, flats, where)
    if isinstance(base, (list, tuple)):  # elastic: states alone, one for each master
        if BASE_OPTIMIZER_STATE_STEP not in shard:
            raise CheckpointError(
                f"{where}: saved with zero_optimization/elastic_checkpoint by an optimizer that counts no steps in its "
                "groups, as torch's; DeepSpeed cannot load that, with or without ds_fp8.\n  Load the weights alone "
                "with load_optimizer_states=False, and leave elastic_checkpoint out of the next save."
            )
        check_states(base, shapes, moments_of(optimizer), where)
    else:
        check_groups_at_rest(optimizer, where)
        check_optimizer(base, optimizer, shapes, where, any_count=bool(getattr(optimizer, "swap_optimizer", False)))


def check_stage0(saved: Any, optimizer: Any, where: str) -> None:
    """Raise CheckpointError for the optimizer's entry of a model file of stage 0, where DeepSpeed's own optimizer takes
    it.
    """
    if not isinstance(saved, dict):
        raise CheckpointError(f"{where}: optimizer is {shown(saved)}, expected the state of an optimizer.")
    shapes = [{tuple(param.shape)} for group in optimizer.param_groups for param in group["params"]]
    check_optimizer(saved.get(OPTIMIZER_STATE_DICT, saved), optimizer, shapes, where)
    check_loss_scale(saved, where)
    masters = saved.get("fp32_groups_flat", saved.get("fp32_groups"))
    if masters is None:
        return
    if not isinstance(masters, (list, tuple)):
        raise CheckpointError(f"{where}: the fp32 masters are {shown(masters)}; it is damaged.")
    flats = [one for group in masters for one in (group if isinstance(group, (list, tuple)) else [group])]
    if len(flats) != len(shapes):
        raise CheckpointError(f"{where}: {len(flats)} fp32 masters, this job has {len(shapes)}.")
    for flat, of_this in zip(flats, shapes, strict=True):
        check_tensor(flat, of_this, "an fp32 master", where)


def check_loss_scale(saved: dict[str, Any], where: str) -> None:
    """Raise CheckpointError if the loss scale of stage 0, where there is one, is not whole or not of numbers."""
    dynamic = saved.get("dynamic_loss_scale")
    if ("fp32_groups" in saved and "dynamic_loss_scale" not in saved) or not (
        dynamic is None or isinstance(dynamic, bool)
    ):
        raise CheckpointError(f"{where}: dynamic_loss_scale is {shown(dynamic)}; it is damaged.")
    needed = () if dynamic is None else ("cur_scale", "cur_iter", *(LOSS_SCALE_HISTORY if dynamic else ()))
    for key in ("cur_scale", "cur_iter", *LOSS_SCALE_HISTORY, CLIP_GRAD):
        if (key in needed or key in saved) and not is_finite_number(saved.get(key)):
            raise CheckpointError(f"{where}: {key} is {shown(saved.get(key))}, expected a number; it is damaged.")


def saved_optimizer(shard: dict[str, Any]) -> Any:
    """The base optimizer's part of a shard: a state_dict of torch's, or, from an elastic save, a list of states."""
    return shard.get(BASE_OPTIMIZER_STATE, shard.get(OPTIMIZER_STATE_DICT))


def count_states(base: Any) -> int:
    """How many masters have a state in what `saved_optimizer` gave; an optimizer makes them in its first step."""
    states = base.get("state") if isinstance(base, dict) else base
    every = states.values() if isinstance(states, dict) else states if isinstance(states, (list, tuple)) else ()
    return sum(bool(state) for state in every)


def check_state_count(saved: Any, base: Any, where: str) -> None:
    """Raise CheckpointError if states are gone, or have come, since the save.

    saved  our entry beside them, which says how many there were under STATES; None where there is no entry
    base   what `saved_optimizer` gave
    """
    wanted = saved.get(STATES) if isinstance(saved, dict) else None
    found = count_states(base)
    if wanted is not None and wanted != found:
        raise CheckpointError(
            f"{where}: states of {found} masters, and {shown(wanted)} were saved; it is damaged.\n"
            "  Use another tag, or load the weights alone with load_optimizer_states=False."
        )


def states_of(base: Any) -> list[Any]:
    """The states in what `saved_optimizer` gave, in the order of the masters; empty for one that is not there."""
    if isinstance(base, (list, tuple)):
        return list(base)
    return [base["state"].get(index, {}) for group in base["param_groups"] for index in group["params"]]


def _flat_shapes(
    shard: dict[str, Any], optimizer: Any, flats: Sequence[torch.Tensor], where: str
) -> list[set[tuple[int, ...]]]:
    """Shapes that a state of each master may have. DeepSpeed leaves the padding out of masters, and not out of
    states.
    """
    own = _own_masters(optimizer)
    paddings = shard.get(GROUP_PADDINGS) or []
    shapes = []
    for number, flat in enumerate(flats):
        padding = paddings[number] if number < len(paddings) and isinstance(paddings[number], int) else 0
        expected: set[tuple[int, ...]] | None = None
        if len(own) == len(flats):
            expected = {(own[number].numel(),), (own[number].numel() - padding,)}
        check_tensor(flat, expected, "an fp32 master", where)
        shapes.append({(flat.numel(),), (flat.numel() + padding,), *(expected or ())})
    return shapes


def _own_masters(optimizer: Any) -> Sequence[torch.Tensor]:
    return next((found for name in OWN_MASTERS if (found := getattr(optimizer, name, None)) is not None), [])


def moments_of(optimizer: Any) -> tuple[str, ...]:
    """What each state of the base optimizer has once it has stepped: ours says it itself, an Adam (`fp8` alone) is
    known by its class.
    """
    base = getattr(optimizer, "optimizer", None) or optimizer
    own = getattr(base, "moments", None)
    if own is None:
        own = ("exp_avg", "exp_avg_sq") if type(base).__name__ in ADAMS else ()
        if own and type(base).__module__.startswith("torch.optim"):
            own = ("step", *own)  # DeepSpeed's own count in the group
    return tuple(own)


def check_groups_at_rest(optimizer: Any, where: str) -> None:
    """Raise CheckpointError if ZeRO 3 would name its masters twice. It puts them into the groups for a load and takes
    them out afterwards; torch's Adagrad, which it makes anew, has them there from the start until the first step.
    """
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    named = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if masters is not None and any(id(master) in named for master in masters):
        raise CheckpointError(
            f"{where}: DeepSpeed's ZeRO 3 cannot load the states of torch's {type(optimizer.optimizer).__name__} into "
            "a new engine, with or without ds_fp8: it names every master twice.\n  Use ZeRO 1 or 2, or another "
            "optimizer; or load the weights alone with load_optimizer_states=False."
        )


def check_optimizer(
    base: Any, optimizer: Any, shapes: Sequence[set[tuple[int, ...]]], where: str, any_count: bool = False
) -> None:
    """Raise CheckpointError if `base` is no state_dict that the engine's `optimizer` could go on with.

    shapes     those that a state of each master may have, in the order of the parameters
    any_count  the groups may name another number of masters (stage 3 swaps some to NVMe)
    """
    if (
        not isinstance(base, dict)
        or not {"state", "param_groups"} <= base.keys()
        or not isinstance(base["state"], dict)
    ):
        raise CheckpointError(f"{where}: the optimizer's state is not that of an optimizer of torch's; it is damaged.")
    check_groups(base["param_groups"], optimizer.param_groups, where)
    check_capturable(base["param_groups"], optimizer, where)
    indices = [index for group in base["param_groups"] for index in group["params"]]
    if len(indices) != len(set(indices)) or (len(indices) != len(shapes) and not any_count):
        raise CheckpointError(
            f"{where}: the parameter groups name {len(indices)} masters, there are {len(shapes)}: another model, or "
            "damaged."
        )
    lost = [index for index in base["state"] if index not in indices]
    if lost:
        raise CheckpointError(f"{where}: states of {shown(lost[0])}, which no parameter group names; it is damaged.")
    check_states(states_of(base), shapes, moments_of(optimizer), where)
    for group in base["param_groups"]:
        states = [base["state"].get(index) or {} for index in group["params"]]
        if group.get("amsgrad") and any("exp_avg_sq" in state and "max_exp_avg_sq" not in state for state in states):
            raise CheckpointError(f"{where}: amsgrad is true, and the states have no max_exp_avg_sq; it is damaged.")
    check_needed(base["param_groups"], optimizer.param_groups, where)


def check_needed(saved: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]], where: str) -> None:
    """Raise CheckpointError if a hyper-parameter that every step asks for is missing. After the states: those of
    another optimizer say better what is wrong.
    """
    for number, (group, ours) in enumerate(zip(saved, own, strict=True)):
        for key in (*NOT_NEGATIVE, "betas"):
            if key in ours and key not in group:
                raise CheckpointError(f"{where}: parameter group {number}: no {key}, which this job's optimizer needs.")


def check_groups(saved: Any, own: Sequence[dict[str, Any]], where: str) -> None:
    """Raise CheckpointError for parameter groups whose hyper-parameters this engine's optimizer could not step with."""
    if not isinstance(saved, (list, tuple)) or not all(isinstance(group, dict) for group in saved):
        raise CheckpointError(f"{where}: param_groups is {shown(saved)}, expected one dict for each parameter group.")
    if len(saved) != len(own):
        raise CheckpointError(f"{where}: {len(saved)} parameter groups, this job has {len(own)}.")
    for number, (group, ours) in enumerate(zip(saved, own, strict=True)):
        at = f"{where}: parameter group {number}"
        params = group.get("params")
        if not isinstance(params, (list, tuple)) or not all(type(index) is int for index in params):
            raise CheckpointError(f"{at}: params is {shown(params)}, expected whole numbers; it is damaged.")
        for key in FLAGS:
            if key in group and not isinstance(group[key], (bool, type(None)) if key in FLAGS[:2] else bool):
                raise CheckpointError(f"{at}: {key} is {shown(group[key])}, expected true or false.")
        for key, value in ours.items():
            if key == "params" or key not in group:
                continue
            if not same_kind(group[key], value) or (key in NOT_NEGATIVE and is_negative(group[key])):
                raise CheckpointError(
                    f"{at}: {key} is {shown(group[key])}, this job's optimizer has {shown(value)} there; it is "
                    "damaged, or another optimizer's."
                )
            if key == "betas" and not all(0 <= beta < 1 for beta in group[key]):
                raise CheckpointError(f"{at}: betas is {shown(group[key])}, expected from 0 up to 1; it is damaged.")


def check_capturable(saved: Sequence[dict[str, Any]], optimizer: Any, where: str) -> None:
    """Raise CheckpointError if steps for a CUDA graph were asked for, and masters lie on the CPU."""
    own = [*_own_masters(optimizer), *(param for group in optimizer.param_groups for param in group["params"])]
    for number, group in enumerate(saved):
        if group.get("capturable") and any(param.device.type == "cpu" for param in own):
            raise CheckpointError(
                f"{where}: parameter group {number}: capturable is true, and masters of this job are on the CPU, where "
                "torch takes no such step.\n  Load the weights alone with load_optimizer_states=False."
            )


def check_states(
    states: Sequence[Any], shapes: Sequence[set[tuple[int, ...]]], moments: Sequence[str], where: str
) -> None:
    """Raise CheckpointError for states that cannot be those of masters of `shapes`; an empty one is none yet.

    moments  what a state must have
    """
    for number, state in enumerate(states):
        if isinstance(state, dict) and not state:
            continue
        if not isinstance(state, dict) or not set(moments) <= state.keys():
            raise CheckpointError(
                f"{where}: the state of master {number} is {shown(state)}, expected {', '.join(moments) or 'a dict'}; "
                "it is damaged, or another optimizer's."
            )
        if "step" in state and not is_step(state["step"], fraction="step" in moments):
            raise CheckpointError(f"{where}: the step of master {number} is {shown(state['step'])}; it is damaged.")
        for key, value in state.items():
            if key in SIZED_STATES and (value is not None or key in moments):
                check_tensor(value, shapes[number] if number < len(shapes) else None, f"{key} of {number}", where)
                if key == "exp_avg_sq" and value.numel() and value.min() < 0:
                    raise CheckpointError(
                        f"{where}: {key} of {number} is negative, an average of squares; it is damaged."
                    )
