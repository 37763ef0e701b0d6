"""The states of a client's optimizer, cut to ZeRO's partitions.

Whoever has trained with torch's Adam and passes the optimizer to `deepspeed.initialize` expects its moments and its
step to go on. The client's states belong to whole parameters, ZeRO steps flats in which parameters lie one after the
other, each rank a part: so every rank cuts its own part out of the states that it has. DeepSpeed alone drops them.

A flat has one step. A parameter without state counts as one whose gradients were zero so far, which is what ZeRO would
have made of it; parameters of one group that have stepped differently often cannot be one flat, and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from .. import optim
from ..algorithms import MOMENTS
from ..errors import PlanError
from .touched import touched

TOUCHED = {
    "AnyWrapper": touched(reads="optimizer"),
    "Engine": touched(reads="device param_names seq_data_parallel_group zero_optimization_stage"),
    "Parameter": touched(reads="ds_numel"),
}


@dataclass(frozen=True)
class ClientStates:
    """`step`, `exp_avg` and `exp_avg_sq` (fp32, whole parameters) of what a client has stepped; may be empty."""

    states: dict[Tensor, dict[str, Any]]

    @classmethod
    def of(cls, client: Any, engine: Any) -> ClientStates:
        """Read and check; PlanError on every rank if it cannot be taken over. Collective over the data-parallel
        group.
        """
        states = optim.client_states(client)
        groups = [[param for param in group["params"] if param.requires_grad] for group in client.param_groups]
        names = getattr(engine, "param_names", {})
        if int(engine.zero_optimization_stage()) > 0:
            for number, group in enumerate(groups):
                _check_steps(number, [states[param]["step"] for param in group if param in states])
        for param, state in states.items():
            _check_sizes(names.get(param, "a parameter"), param, state)
        _check_ranks([param for group in groups for param in group], states, names, engine)
        return cls(states)

    def import_states(self, wrapper: Any) -> None:
        """Encode this rank's part into the partitions of `wrapper`, one flat at a time."""
        if not self.states:
            return
        for index, master in enumerate(wrapper.fp8_masters):
            fragments = [fragment for fragment in wrapper.fp8_fragments(index) if fragment.param in self.states]
            steps = [self.states[param]["step"] for param in wrapper.fp8_params(index) if param in self.states]
            if not steps:
                continue
            flats = {
                moment: torch.zeros(master.numel(), dtype=torch.float32, device=master.device)
                for moment in wrapper.optimizer.moments
            }
            for fragment in fragments:
                for moment, flat in flats.items():
                    whole = self.states[fragment.param][moment].reshape(-1)
                    part = whole.narrow(0, fragment.start_in_param, fragment.numel)
                    flat.narrow(0, fragment.start_in_flat, fragment.numel).copy_(part)
            wrapper.optimizer.import_fp32(master, step=steps[0], **flats)


@dataclass(frozen=True)
class Fragment:
    """Where a part of a parameter lies in one of this rank's flats; elements."""

    param: Tensor
    start_in_param: int
    start_in_flat: int
    numel: int


def _check_steps(number: int, steps: list[int]) -> None:
    if len(set(steps)) > 1:
        raise PlanError(
            f"optimizer group {number}: parameters with {min(steps)} to {max(steps)} steps behind them; in ZeRO they "
            "are stepped as one and have one bias correction.\n"
            "  Put them into groups by their steps, use stage 0, or pass an optimizer without state."
        )


def _check_sizes(name: str, param: Any, state: dict[str, Any]) -> None:
    numel = getattr(param, "ds_numel", param.numel())
    for moment in state.keys() & set(MOMENTS):
        if state[moment].numel() != numel:
            raise PlanError(
                f"optimizer state {moment} of {name}: {state[moment].numel()} elements for a parameter of {numel}. It "
                "was made while zero.Init kept a part of the parameter.\n"
                "  Pass an optimizer without state, or load a state_dict of whole parameters into it first."
            )


def _check_ranks(params: list[Tensor], states: dict[Tensor, dict[str, Any]], names: Any, engine: Any) -> None:
    """A state that one rank has and another has not would be a hole in the middle of a parameter."""
    if not params:
        return
    steps = torch.tensor(
        [states[param]["step"] if param in states else -1 for param in params],
        dtype=torch.float32,
        device=engine.device,
    )
    lowest, highest = steps.clone(), steps.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=engine.seq_data_parallel_group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=engine.seq_data_parallel_group)
    differing = (lowest != highest).nonzero().reshape(-1).tolist()
    if differing:
        name = names.get(params[differing[0]], f"parameter {differing[0]}")
        raise PlanError(
            f"optimizer state of {len(differing)} parameters, first {name}: its step is not the same on all ranks.\n"
            "  Load the optimizer's state_dict on every rank before deepspeed.initialize."
        )
