"""The three forms of a stage 0 optimizer checkpoint, read all, written as the one DeepSpeed would use here.

    bare      fp32 job                    {state, param_groups}                               torch's own
    unfused   16-bit job, torch Adam      {optimizer_state_dict, fp32_groups, loss scale}     one tensor per parameter
    fused     16-bit job, FusedAdam       {optimizer_state_dict, fp32_groups_flat, ...}       one flat per group

All three hold fp32 masters and moments; they differ in what is cut where. `Loaded` is the common form: per parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.checkpoint.constants import CLIP_GRAD, OPTIMIZER_STATE_DICT
from torch import Tensor

from ..algorithms import MOMENTS
from ..errors import CheckpointError
from .states_view import Fp32Adam, check_moments, copy_groups, fp32_groups, fp32_state
from .touched import touched

TOUCHED = {
    "Stage0": touched(reads="clip_grad fp16_groups loss_scale_config optimizer"),
}

LOSS_SCALE_KEYS = ("dynamic_loss_scale", "cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")


@dataclass
class Loaded:
    """A checkpoint, cut to parameters.

    masters      fp32 values in the order of the optimizer's parameters; None where the weights themselves are fp32
    states       per parameter: {step, exp_avg, exp_avg_sq}, or {}
    groups       hyper-parameters per group
    loss_scale   DeepSpeed's loss scale fields, as far as they were saved
    """

    masters: list[Tensor] | None
    states: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    loss_scale: dict[str, Any]

    @property
    def has_moments(self) -> bool:
        return any(self.states)

    def apply(self, wrapper: Any, load_optimizer_states: bool) -> None:
        """Encode everything into `wrapper`'s optimizer."""
        for key, value in self.loss_scale.items():
            setattr(wrapper.loss_scale_config, key, value)
        if load_optimizer_states:
            copy_groups(wrapper.optimizer, Fp32Adam(self.groups, wrapper.optimizer.moments))
        for index, param in enumerate(wrapper.fp8_masters):
            state = self.states[index] if load_optimizer_states else {}
            moments = {key: state[key].reshape(-1) for key in MOMENTS if key in state}
            check_moments(moments, wrapper.optimizer)
            step = int(state["step"]) if "step" in state else None
            master = param.detach().float() if self.masters is None else self.masters[index]
            if load_optimizer_states and not moments:
                wrapper.optimizer.forget_moments(param)  # saved before its first step
            wrapper.optimizer.import_fp32(param, master=master.reshape(-1), step=step, **moments)


def write_state(wrapper: Any) -> dict[str, Any]:
    """The fp32 part of a checkpoint, in the form `wrapper.layout`."""
    optimizer = wrapper.optimizer
    groups = [[optimizer.export_fp32(param) for param in group] for group in wrapper.fp16_groups]
    if wrapper.layout == "fused":
        masters = [[_flat([each["master"] for each in group])] for group in groups]
        states = [[_flat_state(group)] for group in groups]
    else:
        shapes = [[param.shape for param in group] for group in wrapper.fp16_groups]
        masters = [
            [each["master"].to("cpu", torch.float32).view(shape) for each, shape in zip(group, of_group, strict=True)]
            for group, of_group in zip(groups, shapes, strict=True)
        ]
        states = [
            [_shaped(fp32_state(each, torch_step=True), shape) for each, shape in zip(group, of_group, strict=True)]
            for group, of_group in zip(groups, shapes, strict=True)
        ]
    fp32_adam = Fp32Adam(fp32_groups(optimizer, masters), optimizer.moments)
    for tensors, of_group in zip(masters, states, strict=True):
        for tensor, state in zip(tensors, of_group, strict=True):
            if state:
                fp32_adam.state[tensor] = state
    if wrapper.layout == "bare":
        return fp32_adam.state_dict()
    config = wrapper.loss_scale_config
    result: dict[str, Any] = {"dynamic_loss_scale": config.dynamic_loss_scale}
    result |= {"cur_scale": config.cur_scale, "cur_iter": config.cur_iter}
    if config.dynamic_loss_scale:
        result |= {key: getattr(config, key) for key in LOSS_SCALE_KEYS[3:]}
    result[OPTIMIZER_STATE_DICT] = fp32_adam.state_dict()
    if wrapper.layout == "fused":
        result["fp32_groups_flat"] = [tensors[0] for tensors in masters]
        result[CLIP_GRAD] = wrapper.clip_grad
    else:
        result["fp32_groups"] = masters
    return result


def read_state(wrapper: Any, state_dict: dict[str, Any]) -> Loaded:
    """Cut a checkpoint of any form to parameters. CheckpointError if it is none, or of another model."""
    torch_state = state_dict.get(OPTIMIZER_STATE_DICT, state_dict)
    if not isinstance(torch_state, dict) or not {"state", "param_groups"} <= torch_state.keys():
        raise CheckpointError(
            "the optimizer state is none that DeepSpeed writes in stage 0 (no 'state' and 'param_groups').\n"
            "  A checkpoint of another ZeRO stage loads through universal conversion (ds_to_universal.py)."
        )
    params = wrapper.fp16_groups
    saved_groups = torch_state["param_groups"]
    if len(saved_groups) != len(params):
        raise CheckpointError(f"{len(saved_groups)} parameter groups in the checkpoint, {len(params)} in this job.")
    states = [[torch_state["state"].get(index, {}) for index in group["params"]] for group in saved_groups]
    masters: list[list[Tensor]] | None = None
    if "fp32_groups_flat" in state_dict:
        masters = [_cut(flat, group) for flat, group in zip(state_dict["fp32_groups_flat"], params, strict=True)]
        states = [_cut_state(of_group[0], group) for of_group, group in zip(states, params, strict=True)]
    elif "fp32_groups" in state_dict:
        masters = [list(group) for group in state_dict["fp32_groups"]]
    for number, (of_group, group) in enumerate(zip(states, params, strict=True)):
        if len(of_group) != len(group):
            raise CheckpointError(
                f"parameter group {number}: {len(of_group)} in the checkpoint, {len(group)} in this job."
            )
    flat_masters = None if masters is None else [tensor for group in masters for tensor in group]
    _check_sizes(flat_masters, wrapper.fp8_masters)
    return Loaded(
        masters=flat_masters,
        states=[state for of_group in states for state in of_group],
        groups=[{**group, "params": list(own)} for group, own in zip(saved_groups, params, strict=True)],
        loss_scale={key: state_dict[key] for key in LOSS_SCALE_KEYS if key in state_dict},
    )


def _check_sizes(masters: list[Tensor] | None, params: list[Tensor]) -> None:
    for number, (master, param) in enumerate(zip(masters or [], params, strict=masters is not None)):
        if master.numel() != param.numel():
            raise CheckpointError(
                f"parameter {number}: {master.numel()} elements in the checkpoint, {param.numel()} in this model."
            )


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).to("cpu", torch.float32) for tensor in tensors])


def _flat_state(group: list[dict[str, Any]]) -> dict[str, Any]:
    """One state for the whole group; parameters that have not stepped yet count as zero."""
    step = max(int(each["step"]) for each in group)
    if not step:
        return {}
    return {"step": step, **{key: _flat([each[key] for each in group]) for key in MOMENTS if key in group[0]}}


def _shaped(state: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
    return {key: value.view(shape) if key in MOMENTS else value for key, value in state.items()}


def _cut(flat: Tensor, params: list[Tensor]) -> list[Tensor]:
    numels = [param.numel() for param in params]
    if sum(numels) != flat.numel():
        raise CheckpointError(f"{flat.numel()} elements in a flat of the checkpoint, {sum(numels)} in this model.")
    return list(flat.split(numels))


def _cut_state(state: dict[str, Any], params: list[Tensor]) -> list[dict[str, Any]]:
    if not state:
        return [{} for _ in params]
    cut = {key: _cut(state[key].reshape(-1), params) for key in MOMENTS if key in state}
    return [
        {"step": state.get("step", 0), **{key: chunks[index] for key, chunks in cut.items()}}
        for index in range(len(params))
    ]
