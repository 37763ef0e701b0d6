"""The fp32 view: DeepSpeed's own checkpoint code, run on fp32 flats that exist only while it runs.

DeepSpeed reads and writes optimizer shards in several layouts (rigid, elastic, universal, with and without padding),
all in terms of three things: a list of master flats, `optimizer.state` with exp_avg and exp_avg_sq of the same shape,
and `optimizer.param_groups`. We put fp32 CPU tensors and torch's Adam in place of ours, let DeepSpeed do its work, and
take the result back:

    with self.fp8_fp32_view(export=True):    sd = super().state_dict()       quantized values -> fp32 -> file
    with self.fp8_fp32_view(export=False):   super().load_state_dict(...)    file -> fp32
    self.fp8_import(...)                     fp32 -> quantized values

So a checkpoint has DeepSpeed's names and shapes: `zero_to_fp32.py`, universal conversion and a job without the plugin
read it. Cost: 12 bytes per parameter of the partition in host memory, for the length of a save or a load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..algorithms import MOMENTS
from ..errors import CheckpointError
from .touched import touched

if TYPE_CHECKING:
    from .deepspeed_wrappers import AnyWrapper as Base
else:
    Base = object

TOUCHED = {
    "AnyWrapper": touched(reads="optimizer", writes="optimizer"),
}

ADAM_GROUP_KEYS = {
    "amsgrad": False,
    "bias_correction": True,
    "capturable": False,
    "decoupled_weight_decay": False,
    "differentiable": False,
    "foreach": None,
    "fused": None,
    "maximize": False,
}
"""What torch's Adam, DeepSpeed's FusedAdam and its CPUAdam expect to find in a parameter group that they load."""


class Fp32Adam(torch.optim.Optimizer):
    """An Adam that only holds: parameter groups and state as torch's Adam would have them in a checkpoint.

    moments  names of the states, as of the optimizer that it stands for (Lion keeps one)
    """

    def __init__(self, groups: list[dict[str, Any]], moments: tuple[str, ...]):
        super().__init__(groups, {})
        self.moments = moments


def fp32_groups(optimizer: torch.optim.Optimizer, params: list[list[Tensor]]) -> list[dict[str, Any]]:
    """The hyper-parameters of `optimizer`, group by group, with the keys that any Adam asks for."""
    groups = []
    for group, tensors in zip(optimizer.param_groups, params, strict=True):
        kept = {key: value for key, value in group.items() if key != "params"}
        groups.append({**ADAM_GROUP_KEYS, **kept, "params": list(tensors)})
    return groups


def copy_groups(optimizer: torch.optim.Optimizer, fp32_adam: Fp32Adam) -> None:
    """Hyper-parameters that a load has put into `fp32_adam`, into the groups of `optimizer`, in place.

    In place, because learning-rate schedulers hold on to the very dicts.
    """
    for group, loaded in zip(optimizer.param_groups, fp32_adam.param_groups, strict=True):
        for key, value in loaded.items():
            if key not in ("params", "step") and (key in group or key not in ADAM_GROUP_KEYS):
                group[key] = value


def fp32_state(exported: dict[str, Any], *, torch_step: bool) -> dict[str, Any]:
    """One parameter's state as torch's Adam keeps it: fp32 moments on the host and the step; {} before step 1.

    torch_step  the step as torch's Adam keeps it (a tensor), else as FusedAdam and CPUAdam do (an integer). DeepSpeed's
                universal load hands it on unconverted, so it must be that of the optimizer the job would have without
                us
    """
    if not exported["step"]:
        return {}
    moments = {key: exported[key].to("cpu", torch.float32) for key in MOMENTS if key in exported}
    step = int(exported["step"])
    return {"step": torch.tensor(float(step), dtype=torch.float32, device="cpu") if torch_step else step, **moments}


def check_moments(loaded: dict[str, Any], optimizer: Any) -> None:
    """Raise CheckpointError for the states of another algorithm; none at all is a load of weights."""
    if loaded and tuple(loaded) != optimizer.moments:
        raise CheckpointError(
            f"the checkpoint holds {' and '.join(loaded)}, {optimizer.algorithm} keeps "
            f"{' and '.join(optimizer.moments)}: it was saved by another algorithm.\n  Train on with that one, or load "
            "with load_optimizer_states=False."
        )


class Fp32View(Base):
    """Mixin: `fp8_fp32_view` for an optimizer wrapper whose masters lie in the list attribute `FP8_MASTERS`.

    Subclasses say how flats belong to parameter groups (`_fp8_group_params`), and what else has to be pointed at the
    flats while DeepSpeed works (`_fp8_relink`).
    """

    FP8_MASTERS = ""
    fp8_torch_step = False
    _fp8_viewing = False

    @property
    def fp8_masters(self) -> list[Tensor]:
        """This rank's partitions, in the base dtype."""
        return getattr(self, self.FP8_MASTERS)

    def _fp8_group_params(self, flats: list[Tensor]) -> list[list[Tensor]]:
        """Which flats stand in which parameter group, as DeepSpeed expects to find them between two steps."""
        return [[flat] for flat in flats]

    def _fp8_relink(self) -> None:
        """Point tensor fragments at the current `fp8_masters`."""

    @contextmanager
    def fp8_fp32_view(self, *, export: bool) -> Iterator[tuple[Fp32Adam, list[Tensor]]]:
        """Torch's Adam and fp32 flats in place of ours; `export` fills them, else they start at zero."""
        ours, masters = self.optimizer, self.fp8_masters
        flats: list[Tensor] = []
        states: list[dict[str, Any]] = []
        for master in masters:
            if export:
                exported = ours.export_fp32(master)
                flats.append(exported["master"].to("cpu", torch.float32))
                states.append(fp32_state(exported, torch_step=self.fp8_torch_step))
            else:
                flats.append(torch.zeros(master.numel(), dtype=torch.float32, device="cpu"))
                states.append({})
        fp32_adam = Fp32Adam(fp32_groups(ours, self._fp8_group_params(flats)), ours.moments)
        steps = [state["step"] for state in states if state]
        if steps:
            # FusedAdam and elastic checkpoints look for the step in the group as well.
            for group in fp32_adam.param_groups:
                group["step"] = int(steps[0])
        for flat, state in zip(flats, states, strict=True):
            if state:
                fp32_adam.state[flat] = state
        self.optimizer = cast("Any", fp32_adam)
        setattr(self, self.FP8_MASTERS, flats)
        self._fp8_viewing = True
        try:
            if not export:
                self._fp8_relink()
            yield fp32_adam, flats
        finally:
            self.optimizer = ours
            setattr(self, self.FP8_MASTERS, masters)
            self._fp8_viewing = False
            if not export:
                self._fp8_relink()

    def fp8_import(self, fp32_adam: Fp32Adam, flats: list[Tensor], *, replace: bool = False) -> None:
        """Encode what a load has left in the fp32 view. Moments that were not loaded stay as they are.

        replace  states were asked for: a flat without any was saved before its first step, and is so again
        """
        copy_groups(self.optimizer, fp32_adam)
        group_step = fp32_adam.param_groups[0].get("step")
        for master, flat in zip(self.fp8_masters, flats, strict=True):
            state = fp32_adam.state.get(flat, {})
            moments = {key: state[key] for key in MOMENTS if key in state}
            check_moments(moments, self.optimizer)
            step = state.get("step", group_step) if moments else None
            step = None if step is None else int(step)
            if replace and not moments:
                self.optimizer.forget_moments(master)
            self.optimizer.import_fp32(master, master=flat, step=step, **moments)
