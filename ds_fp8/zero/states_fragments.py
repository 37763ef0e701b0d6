"""Tensor fragments: `safe_get_full_fp32_param` and related functions on quantized states.

DeepSpeed gives each 16-bit parameter of ZeRO 1, 2 and BF16_Optimizer a `tensor_fragment`: views into this rank's master
flat and into each state. With quantized values there is no such view: a uint8 state of the flat's shape would be handed
out raw, and a view of the master would show its upper 16 bits only. So the fragment decodes when it is asked, and the
setter encodes. Reading costs one decode of the blocks that the fragment touches; nothing fp32 is kept.

In 8 bits exp_avg is a ratio to the root of exp_avg_sq: who sets both sets exp_avg_sq first. In the other order exp_avg
is rounded twice, the first time beside roots that it has nothing to do with.

Setting a parameter writes the 16-bit weight too, whole and on every rank (the caller passes the full value), because
the weight *is* the upper half of the master.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state
from deepspeed.utils.tensor_fragment import tensor_fragment
from torch import Tensor

from ..optim.masters import upper_half
from .touched import touched

TOUCHED = {
    "AnyWrapper": touched(reads="optimizer"),
    "Parameter": touched(
        reads="_dp_group _hp_mapping hp_fragment optim_fragment",
        writes="get_full_hp_param hp_fragment load_hp_checkpoint_state optim_fragment set_full_hp_param",
    ),
    "TensorFragment": touched(reads="get_hp_fragment hp_fragment_address lp_fragment_address"),
}


class QuantizedFragment(tensor_fragment):
    """A fragment of a partition that is kept in quantized form; `fp8_wrapper` and `fp8_master` say whose."""

    fp8_wrapper: Any
    fp8_master: Tensor

    def get_optim_state_keys(self) -> list[str]:
        return list(self.fp8_wrapper.optimizer.moments)

    def get_optim_state_fragment(self, key: str) -> Tensor:
        return self.get_hp_fragment(key)

    def get_hp_fragment(self, optim_state_key: str | None = None) -> Tensor:
        """A decoded fp32 copy of this fragment's master, exp_avg or exp_avg_sq."""
        key = optim_state_key or "master"
        if key not in ("master", *self.fp8_wrapper.optimizer.moments):
            raise ValueError(f"{key} not found in optimizer state fragment")
        address = self.hp_fragment_address
        return read_slice(self.fp8_wrapper.optimizer, self.fp8_master, key, address.start, address.numel)

    def set_hp_fragment(self, value: Tensor, optim_state_key: str | None = None) -> None:
        """Encode `value` (fp32, this fragment's elements) into the master or a state."""
        address = self.hp_fragment_address
        key = optim_state_key or "master"
        write_slice(self.fp8_wrapper.optimizer, self.fp8_master, key, address.start, value)


def read_slice(optimizer: Any, master: Tensor, key: str, start: int, numel: int) -> Tensor:
    """fp32 copy of elements [start, start + numel) of `master` itself or of its state `key`."""
    return optimizer.export_fp32(master, only=(key,), start=start, stop=start + numel)[key]


def write_slice(optimizer: Any, master: Tensor, key: str, start: int, value: Tensor) -> None:
    """Encode `value` into elements [start, start + value.numel()); neighbours in the same blocks are encoded again."""
    whole = optimizer.export_fp32(master, only=(key,))[key]
    whole.narrow(0, start, value.numel()).copy_(value.detach().reshape(-1))
    optimizer.import_fp32(master, **{key: whole})


def get_full_hp_param(self: Any, optim_state_key: str | None = None) -> Tensor:
    """fp32 value of a whole parameter or state, the same on all ranks. Collective over the parameter's group."""
    device = self.device
    full = torch.zeros(self.numel(), dtype=torch.float32, device=device)
    if self._hp_mapping is not None:
        address = self._hp_mapping.lp_fragment_address
        fragment = self._hp_mapping.get_hp_fragment(optim_state_key)
        full.narrow(0, address.start, address.numel).copy_(fragment)
    dist.all_reduce(full, group=self._dp_group)
    return full.reshape(self.shape)


def set_full_hp_param(self: Any, value: Tensor, optim_state_key: str | None = None) -> None:
    """Set a whole parameter or state from its full value; every rank calls it with the same value."""
    wrapper = self.fp8_wrapper
    if optim_state_key is None:
        flat = value.detach().reshape(-1).to(self.device)
        wrapper.fp8_set_weight(self, upper_half(wrapper.optimizer.level.master, flat, self.dtype))
    if self._hp_mapping is not None:
        address = self._hp_mapping.lp_fragment_address
        self._hp_mapping.set_hp_fragment(
            value.reshape(-1).narrow(0, address.start, address.numel).float(), optim_state_key
        )
    if optim_state_key is None:
        wrapper.fp8_weights_changed()


def link_quantized_fragments(wrapper: Any, groups: list[list[Any]], masters: list[Tensor]) -> None:
    """Make the fragments that DeepSpeed has just linked decode and encode.

    wrapper  the specialised optimizer
    groups   its 16-bit parameters, one list per master
    """
    for params, master in zip(groups, masters, strict=True):
        for param in params:
            param.fp8_wrapper = wrapper
            param.get_full_hp_param = MethodType(get_full_hp_param, param)
            param.set_full_hp_param = MethodType(set_full_hp_param, param)
            param.load_hp_checkpoint_state = MethodType(load_universal_fragment, param)
            fragment = param._hp_mapping
            if fragment is not None:
                fragment.__class__ = QuantizedFragment
                fragment.fp8_wrapper, fragment.fp8_master = wrapper, master
                # Not the view that DeepSpeed made: it would keep a replaced storage alive.
                fragment.hp_fragment = None
                fragment.optim_fragment = {}


def load_universal_fragment(self: Any, folder: str, tp_rank: int, tp_world_size: int, **experts: int) -> Any:
    """A parameter's `load_hp_checkpoint_state` that also reads what was converted from stage 3.

    There the converter writes bare tensors, where DeepSpeed's stages 1 and 2 expect a dict with the tensor in it, and
    no step; the step is in the file of all parameters.
    """
    whole = torch.load(Path(folder) / "fp32.pt", map_location="cpu", weights_only=False)
    if isinstance(whole, dict):
        return load_hp_checkpoint_state(self, folder, tp_rank, tp_world_size, **experts)
    address = self._hp_mapping.lp_fragment_address
    self._hp_mapping.hp_fragment.data.copy_(whole.reshape(-1).narrow(0, address.start, address.numel))
    self._hp_mapping.optim_fragment = {}
    for key in self.fp8_wrapper.optimizer.moments:
        whole = torch.load(Path(folder) / f"{key}.pt", map_location="cpu", weights_only=False)
        self._hp_mapping.optim_fragment[key] = whole.reshape(-1).narrow(0, address.start, address.numel).clone()
    return None
