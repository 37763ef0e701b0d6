"""The model file of a checkpoint: the module, DeepSpeed's counters and scheduler, and at stage 0 the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT

from ..errors import CheckpointError
from ..zero.states import KEY
from ..zero.states_stage0 import Stage0Optimizer
from ..zero.states_stage0_formats import read_state
from ..zero.touched import touched
from .deepspeed_entries import (
    check_counters,
    check_groups,
    check_loss_scale,
    check_needed,
    check_scheduler,
    check_stage0,
    check_state_count,
    check_states,
)
from .entries import check_entry, check_masters, check_moments
from .module import check_module
from .reading import read_by_engine
from .stamp import ids_of
from .universal import CONVERT

TOUCHED = {
    "Engine": touched(
        reads="_get_all_ckpt_names load_universal_checkpoint module optimizer seq_dp_world_size zero_optimization",
    ),
}


def inspect_model(
    engine: Any,
    load_dir: Any,
    tag: str,
    files: dict[str, Any],
    with_optimizer: bool,
    check_client_state: Callable[[Any, str], None] | None,
    strict: bool,
) -> tuple[int | None, list[str]]:
    """(optimizer steps of the model file, ids of the saves that it and an optimizer in it come from).

    files               gets the path and the content of what is read here
    with_optimizer      the optimizer's state will be loaded
    check_client_state  called with what stands under KEY, and the path; raises CheckpointError
    strict              the module's names and shapes must be those of the file
    CheckpointError if the file is not there, damaged, or not this job's.
    """
    names = engine._get_all_ckpt_names(load_dir, tag)
    absent = [name for name in names if not Path(name).is_file()]
    if absent or not names:
        raise CheckpointError(
            f"{absent[0] if absent else Path(load_dir) / tag}: no model file of DeepSpeed there. Use another tag."
        )
    if len(names) != 1:
        return None, []  # several model-parallel files are merged by DeepSpeed
    state = files[names[0]] = read_by_engine(engine, names[0])
    if not isinstance(state, dict) or "module" not in state:
        raise CheckpointError(f"{names[0]}: no model state of DeepSpeed.")
    if check_client_state is not None:
        check_client_state(state.get(KEY), names[0])
    if KEY in state and not isinstance(state[KEY], dict):
        raise CheckpointError(f"{names[0]}: the entry {KEY!r} is {type(state[KEY]).__name__}; it is damaged.")
    if strict and not engine.load_universal_checkpoint():
        check_module(engine.module, state["module"], names[0])
    ids = ids_of(state.get(KEY))
    optimizer = engine.optimizer
    if with_optimizer and isinstance(optimizer, Stage0Optimizer):
        saved = state.get("optimizer")
        if saved is None:
            raise CheckpointError(
                f"{names[0]}: no optimizer state, as ZeRO stages keep theirs in files of their own.\n{CONVERT}"
                "\n  Or load the weights alone with load_optimizer_states=False."
            )
        ids += _inspect_stage0(optimizer, saved, names[0])
    elif with_optimizer and optimizer is not None and not engine.zero_optimization():
        check_stage0(state.get("optimizer"), optimizer, names[0])
        check_state_count(state.get(KEY), state["optimizer"].get(OPTIMIZER_STATE_DICT, state["optimizer"]), names[0])
    step = state.get("global_steps")
    return step if isinstance(step, int) else None, ids


def _inspect_stage0(optimizer: Any, saved: Any, where: str) -> list[str]:
    """The id of the save that the states of stage 0 come from, which lie in the model file."""
    loaded = read_state(optimizer, saved)
    entry = saved.get(KEY)
    check_entry(entry, where, rank=0, world_size=0)  # every rank of stage 0 has all states
    if entry is not None:
        check_masters(entry, [] if loaded.masters is None else loaded.masters, where)
        check_moments(entry, loaded.states, where)
    groups, own = saved.get(OPTIMIZER_STATE_DICT, saved)["param_groups"], optimizer.optimizer.param_groups
    check_groups(groups, own, where)
    shapes = [{tuple(master.shape), (master.numel(),)} for master in optimizer.fp8_masters]
    check_states(loaded.states, shapes, optimizer.optimizer.moments, where)
    check_needed(groups, own, where)
    check_loss_scale(saved, where)
    return ids_of(entry)


def inspect_counters(engine: Any, files: dict[str, Any], with_scheduler: bool, with_optimizer: bool) -> None:
    """What DeepSpeed takes from the model file besides: counters, and the state of its scheduler."""
    for name, state in files.items():
        check_counters(state, name)
        if state["mp_world_size"] != 1:
            raise CheckpointError(f"{name}: one model file, of {state['mp_world_size']} that were saved.")
        ranks = getattr(engine, "seq_dp_world_size", None)
        shards = with_optimizer and engine.zero_optimization() and not engine.load_universal_checkpoint()
        if shards and ranks is not None and state["dp_world_size"] != ranks:
            raise CheckpointError(
                f"{name}: written by {state['dp_world_size']} data-parallel ranks, this job has {ranks}.\n{CONVERT}"
            )
        if with_scheduler:
            check_scheduler(engine, state.get("lr_scheduler"), name)
