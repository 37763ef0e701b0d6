"""What the mixins for states share in all stages: masters are aliased, the clip is applied in the step, states are
quantized.

*Master by aliasing.* DeepSpeed keeps two copies of a rank's own weights: its slice of the 16-bit weights, and a master
partition in fp32. Our master is that 16-bit slice plus a remainder (`split32`, `split24`) or plus quantized values of
its own, so DeepSpeed is told that masters have the base dtype, and each master partition is pointed at the slice. Its
copy back after the step becomes a copy of a tensor onto itself, which torch skips.

*Clip and unscale in the step.* DeepSpeed multiplies every gradient by 1 / (loss scale x clip) in a pass of its own. The
step reads the gradients anyway, so it gets the factor as `ScaledOptimizer.grad_scale`: one pass less, and no second
rounding to 16 bits. Norm, overflow check and loss scale stay DeepSpeed's, number for number.

*Quantized values in the checkpoint.* `state_dict()` is DeepSpeed's own on fp32 flats (`states_view.py`), plus the exact
quantized values under `ds_fp8`; a load with the same layout takes the quantized values, any other takes the flats.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import DS_VERSION, OPTIMIZER_STATE_DICT, ZERO_STAGE
from torch import Tensor

from ..errors import CheckpointError, WeightError
from ..layers import ModelFp8State
from ..numerics.dtypes import as_tensor
from ..optim.checkpointing import KEY
from ..plan import Plan
from .states_client import Fragment
from .states_view import Fp32Adam, Fp32View
from .touched import touched

TOUCHED = {
    "AnyWrapper": touched(
        overrides="_restore_from_bit16_weights load_state_dict refresh_fp32_params state_dict",
        reads="clip_grad dp_process_group optimizer",
    ),
    "ZeroStage12 Bf16": touched(overrides="_lazy_init_hp_params_optimizer_state", writes="_hp_optimizer_states_linked"),
    "ZeroStage12 ZeroStage3": touched(reads="loss_scale"),
    "Engine": touched(reads="zero_optimization_stage"),
    "Parameter": touched(reads="_hp_mapping"),
    "TensorFragment": touched(reads="hp_fragment_address lp_fragment_address"),
}

VERSION = 1
DIGEST = "digest"
"""Key of an entry's `head_digest`; entries of version 0.1.0 have none."""


class ScaledStates(Fp32View):
    """Mixin over one of DeepSpeed's optimizer wrappers; `fp8_*` attributes are set by `specialize`."""

    fp8_engine: Any
    fp8_plan: Plan
    fp8_layers_state: ModelFp8State | None
    loss_scale: Any

    def fp8_slices(self) -> list[Tensor]:
        """This rank's own slice of the 16-bit weights, one per master."""
        raise TypeError(f"{type(self).__name__} has no 16-bit slices")

    def fp8_shares_storage(self) -> bool:
        """Whether masters may be the slices themselves: not under offload (another device)."""
        return True

    def fp8_alias_masters(self) -> None:
        """Point every master at its 16-bit slice; DeepSpeed's clone of it is freed."""
        if self.fp8_shares_storage():
            for master, own in zip(self.fp8_masters, self.fp8_slices(), strict=True):
                if master.dtype == own.dtype and master.device == own.device and master.numel() == own.numel():
                    master.data = own.data
        self._fp8_relink()

    def fp8_params(self, index: int) -> list[Any]:
        """The 16-bit parameters that master `index` belongs to, those of other ranks' partitions too."""
        raise TypeError(f"{type(self).__name__} has no list of parameters")

    def fp8_fragments(self, index: int) -> list[Fragment]:
        """Which parts of which parameters lie in master `index`: by default, DeepSpeed's fragments."""
        fragments = []
        for param in self.fp8_params(index):
            if param._hp_mapping is not None:
                of_param, of_flat = param._hp_mapping.lp_fragment_address, param._hp_mapping.hp_fragment_address
                fragments.append(Fragment(param, of_param.start, of_flat.start, of_flat.numel))
        return fragments

    def fp8_weights_changed(self) -> None:
        """Weights were written outside of a step. Nothing to do here: O3 gathers its quantized values again."""

    def fp8_set_weight(self, param: Any, value: Tensor) -> None:
        """Write a whole 16-bit parameter on this rank (its upper half of the new master)."""
        if param.data.numel() == value.numel() and param.untyped_storage().size():
            param.data.copy_(value.reshape(param.shape))

    def _fp8_set_grad_scale(self, total_norm: Any) -> None:
        """The factor that DeepSpeed would multiply gradients with, in the same arithmetic, handed to the step."""
        combined: Any = self.loss_scale
        if self.clip_grad > 0.0:
            clip = ((total_norm / self.loss_scale) + 1e-6) / self.clip_grad
            combined = torch.clamp(as_tensor(clip), min=1.0) * self.loss_scale
        self.optimizer.grad_scale = 1.0 / combined

    def _lazy_init_hp_params_optimizer_state(self) -> None:
        """Quantized fragments need no link to states: they decode when asked."""
        self._hp_optimizer_states_linked = True

    def fp8_layout(self) -> dict[str, Any]:
        """What must be equal for quantized values to be taken as they are: formats, sizes, and which part of the whole
        this is.
        """
        masters = self.fp8_masters
        return {
            "stage": int(self.fp8_engine.zero_optimization_stage()),
            "rank": dist.get_rank(group=self.dp_process_group),
            "world_size": dist.get_world_size(group=self.dp_process_group),
            "numel": [master.numel() for master in masters],
            "base_dtype": str(masters[0].dtype).removeprefix("torch.") if masters else "",
            "formats": self.optimizer.formats(),
        }

    def state_dict(self) -> dict[str, Any]:
        """DeepSpeed's own, in fp32, plus our quantized values. Views of a copy: later steps do not change it."""
        with self.fp8_fp32_view(export=True) as (fp32_adam, _):
            state = super().state_dict()
            self._fp8_serve_other_stages(state, fp32_adam)
        state[KEY] = quantized_state(self.optimizer, self.fp8_masters, self.fp8_layout())
        return state

    def _fp8_serve_other_stages(self, state: dict[str, Any], fp32_adam: Fp32Adam) -> None:
        """What universal conversion passes on unread, and what a job in another stage looks for in it.

        Stages 1 and 2 ask for DeepSpeed's version, which stage 3 does not write; stage 3 asks for a step where stages 1
        and 2 have none.
        """
        state.setdefault(DS_VERSION, deepspeed.__version__)
        # BF16_Optimizer partitions like stage 1 but does not say so; zero_to_fp32.py asks.
        state.setdefault(ZERO_STAGE, 1)
        if OPTIMIZER_STATE_DICT not in state:
            groups = [
                {key: value for key, value in group.items() if key != "params"} for group in fp32_adam.param_groups
            ]
            step = next((int(entry["step"]) for entry in fp32_adam.state.values()), 0)
            state[OPTIMIZER_STATE_DICT] = {"state": {0: {"step": step}}, "param_groups": groups}

    def load_state_dict(self, state_dict_list: Any, *args: Any, **kwargs: Any) -> None:
        """Any layout that DeepSpeed reads; exact quantized values if this rank's shard has them for this very
        layout.
        """
        own = own_shard(state_dict_list, dist.get_rank(group=self.dp_process_group))
        with self.fp8_fp32_view(export=False) as (fp32_adam, flats):
            super().load_state_dict(state_dict_list, *args, **kwargs)
        universal = kwargs.get("checkpoint_folder") is not None
        self.fp8_import(fp32_adam, flats, replace=kwargs.get("load_optimizer_states", False) and not universal)
        with_moments = any(fp32_adam.state.get(flat) for flat in flats)
        if own is not None and with_moments and self._fp8_took_fp32(args, kwargs):
            load_quantized(self.optimizer, self.fp8_masters, own.get(KEY), self.fp8_layout())
        self.fp8_gather_weights()

    def _fp8_took_fp32(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether DeepSpeed restored masters from the shard, and not from the 16-bit weights."""
        return bool(kwargs.get("load_from_fp32_weights", args[1] if len(args) > 1 else False))

    def fp8_gather_weights(self) -> None:
        """Make every rank's 16-bit weights those of the owners, after a load."""
        self.fp8_weights_changed()

    def _restore_from_bit16_weights(self) -> None:
        """Masters from the 16-bit weights: the remainder of an older master must go, not be added to new weights."""
        if self._fp8_viewing:
            super()._restore_from_bit16_weights()
            return
        for master, own in zip(self.fp8_masters, self.fp8_slices(), strict=True):
            self.optimizer.import_fp32(master, master=own.detach().float().to(master.device))

    def refresh_fp32_params(self) -> None:
        self._restore_from_bit16_weights()


def quantized_state(optimizer: Any, masters: list[Tensor], layout: dict[str, Any]) -> dict[str, Any]:
    """The exact state, as built-in types and CPU tensors: safe under `torch.load(weights_only=True)`.

    `save` is the stamp of the save that is under way (`checkpoint/stamp.py`); none outside of one.
    """
    stamp = getattr(optimizer, "save_stamp", None)
    state = {
        "version": VERSION,
        "layout": layout,
        "seed": int(optimizer.seed),
        "codes": [optimizer.export_quantized(master) for master in masters],
        **({} if stamp is None else {"save": stamp}),
    }
    return {**state, DIGEST: head_digest(state)}


def head_digest(state: dict[str, Any]) -> str:
    """A hash of all that is no tensor: a changed layout would cost the exact values without a word."""
    heads = [{key: one for key, one in each.items() if key not in ("tensors", "weight")} for each in state["codes"]]
    head = json.dumps([state["layout"], state["seed"], heads], sort_keys=True, default=str)
    return hashlib.sha256(head.encode()).hexdigest()


def own_shard(state_dict_list: Any, rank: int) -> dict[str, Any] | None:
    """This rank's shard among those that the engine has read; None for a universal checkpoint."""
    if not state_dict_list:
        return None
    shard = state_dict_list[rank]
    return shard if isinstance(shard, dict) else None


def check_quantized(state: Any, where: str) -> None:
    """Raise CheckpointError if `state`, the entry `ds_fp8` of a shard, is not one that this version can read."""
    if state is None:
        return
    if not isinstance(state, dict) or not {"version", "layout", "codes", "seed"} <= state.keys():
        raise CheckpointError(f"{where}: the entry {KEY!r} of the optimizer shard was not written by ds_fp8.")
    for key, kind in (("version", int), ("layout", dict), ("codes", (list, tuple)), ("seed", int)):
        if not isinstance(state[key], kind):
            raise CheckpointError(
                f"{where}: {KEY}/{key} is a {type(state[key]).__name__}; the entry of the optimizer shard is damaged."
            )
    numels = state["layout"].get("numel")
    if not isinstance(numels, (list, tuple)) or not all(isinstance(numel, int) and numel >= 0 for numel in numels):
        raise CheckpointError(
            f"{where}: {KEY}/layout/numel is {numels!r}; the entry of the optimizer shard is damaged."
        )
    if state["version"] > VERSION:
        raise CheckpointError(
            f"{where}: optimizer state of version {state['version']}, this ds_fp8 reads up to {VERSION}."
            " Upgrade ds_fp8, or load without the plugin: the fp32 flats beside it are unmodified DeepSpeed."
        )
    if len(state["codes"]) != len(numels):
        raise CheckpointError(
            f"{where}: quantized values of {len(state['codes'])} partitions for a layout of {len(numels)}."
        )
    if DIGEST in state and (
        not all(isinstance(one, dict) for one in state["codes"]) or head_digest(state) != state[DIGEST]
    ):
        raise CheckpointError(
            f"{where}: layout, seed, steps or formats ({KEY}) are not those that were saved; the entry of the "
            "optimizer shard is damaged."
        )


def load_quantized(optimizer: Any, masters: list[Tensor], state: Any, layout: dict[str, Any]) -> bool:
    """Take exact quantized values if they were written for this very layout; False if the fp32 flats have to do."""
    check_quantized(state, "checkpoint")
    if state is None or state["layout"] != layout:
        return False
    for master, quantized in zip(masters, state["codes"], strict=True):
        optimizer.import_quantized(master, quantized)
    optimizer.seed = state["seed"]
    return True


def refuse_offload_states(optimizer: Any) -> NoReturn:
    """`engine.offload_states()`."""
    raise WeightError(
        f"{type(optimizer).__name__}.offload_states: DeepSpeed moves fp32 masters and states apart from the 16-bit "
        "weights; with msamp the master *is* the 16-bit weight plus a remainder.\n"
        "  Use zero_optimization/offload_optimizer with device cpu instead, or leave the msamp section out."
    )
