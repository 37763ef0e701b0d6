"""Every private name of DeepSpeed that we touch, with the signature we expect there.

DeepSpeed moves monthly, and a hook on a method that has changed its meaning trains on in silence, unquantised or
wrong. So nothing outside this table may be hooked: `verify` compares the installed DeepSpeed with it, and refuses with
the list of differences as soon as a job asks for `fp8` or `msamp`. Jobs that ask for nothing are left alone.

A signature may have changed between releases without harm: `Seam.signatures` lists every parameter list that our code
was written for, newest first. Compared with DeepSpeed 0.17.6, 0.18.0, 0.18.4, 0.18.9, 0.19.0, 0.19.2, 0.19.5, 0.19.7 and 0.19.8.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import SeamError

ENGINE = "deepspeed.runtime.engine"
STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2"
STAGE_3 = "deepspeed.runtime.zero.stage3"


@dataclass(frozen=True)
class Seam:
    """One place where we meet DeepSpeed.

    module      where it lives
    path        attribute path inside the module: `Class.method` or `function`
    signatures  accepted parameter names, one tuple for each known form; empty: only its presence matters
    why         what we do there
    """

    module: str
    path: str
    signatures: tuple[tuple[str, ...], ...]
    why: str

    def find(self) -> object:
        """The live object; AttributeError or ImportError when it is gone."""
        found: object = importlib.import_module(self.module)
        for name in self.path.split("."):
            found = getattr(found, name)
        return found


def _seam(module: str, path: str, *signatures: str, why: str) -> Seam:
    return Seam(module, path, tuple(tuple(text.split()) for text in signatures), why)


SEAMS: dict[str, Seam] = {
    "configure_distributed_model": _seam(
        ENGINE,
        "DeepSpeedEngine._configure_distributed_model",
        "self model",
        why="layers are swapped before the cast, the broadcast and ZeRO's hooks",
    ),
    "configure_optimizer": _seam(
        ENGINE,
        "DeepSpeedEngine._configure_optimizer",
        "self client_optimizer model_parameters",
        why="a client's Adam is taken over",
    ),
    "configure_basic_optimizer": _seam(
        ENGINE,
        "DeepSpeedEngine._configure_basic_optimizer",
        "self model_parameters",
        why="the optimizer of the JSON becomes ours",
    ),
    "configure_zero_optimizer": _seam(
        ENGINE,
        "DeepSpeedEngine._configure_zero_optimizer",
        "self optimizer",
        why="ZeRO's optimizer is specialised",
    ),
    "init_autocast_params": _seam(
        "deepspeed.runtime.torch_autocast",
        "init_autocast_params",
        "engine dtype torch_autocast_lower_precision_safe_modules",
        why="it marks parameters for the 16-bit wire by the class of their module, so it looks before the swap too",
    ),
    "take_model_step": _seam(
        ENGINE,
        "DeepSpeedEngine._take_model_step",
        "self lr_kwargs",
        "self lr_kwargs block_eigenvalue",
        why="weights have changed: cached codes are stale, telemetry is due",
    ),
    "save_checkpoint": _seam(
        ENGINE,
        "DeepSpeedEngine.save_checkpoint",
        "self save_dir tag client_state save_latest exclude_frozen_parameters",
        why="scales and histories travel in the client state",
    ),
    "load_checkpoint": _seam(
        ENGINE,
        "DeepSpeedEngine.load_checkpoint",
        "self load_dir tag load_module_strict load_optimizer_states load_lr_scheduler_states load_module_only "
        "custom_load_fn",
        why="scales and histories come back",
    ),
}
"""Name -> seam. A package that hooks something new adds it here, with a reason."""

FP8 = tuple(SEAMS)
"""What `fp8` alone meets: the same in DeepSpeed 0.17.6 to 0.19.8. The rest below is `msamp`'s, as 0.19.8 has it."""

_WIRE = (
    (STAGE_1_2, "DeepSpeedZeroOptimizer", (
        ("average_tensor", "self tensor communication_data_type"),
        ("allreduce_and_scatter", "self bucket communication_data_type numel_per_bucket log divide process_group"),
        ("allreduce_no_retain", ("self bucket communication_data_type numel_per_bucket rank log divide process_group "
                                "output_bucket")),
        ("gradient_reduction_w_predivide", "self tensor communication_data_type"),
        ("buffered_reduce_fallback", "self rank grads communication_data_type elements_per_buffer log"),
        ("_buffered_reduce_fallback_preserving_fp32", ("self grads grad_params communication_data_type "
                                                      "elements_per_buffer")),
        ("_add_full_reduction_to_compact_grad_partition", "self reduced_tensor communication_data_type"),
        ("_get_compact_grad_partition_slice", "self group_idx partition_id param_id num_elements"),
        ("_add_to_grad_partition_buffer", "output source"),
        ("_clear_previous_reduced_grads", "self"),
        ("_update_model_bit16_weights", "self group_index"),
        ("update_lp_params", "self"),
        ("_restore_from_bit16_weights", "self"),
    )),
    (STAGE_3, "DeepSpeedZeroOptimizer_Stage3", (
        ("_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads", "self params_to_reduce communication_data_type"),
        ("_DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads",
         "self buffer_to_reduce communication_data_type"),
        ("_gradient_averaging_world_size", "self params partition_world_size"),
        ("_get_param_partition_group", "self param"),
    )),
    (ENGINE, "DeepSpeedEngine", (("allreduce_bucket", "self bucket dp_group dp_world_size"),)),
    ("deepspeed.runtime.zero.partition_parameters", "GatheredParameters", (
        ("__init__", "self params modifier_rank fwd_module enabled"),
        ("__enter__", "self"),
        ("__exit__", "self exc"),
    )),
)  # fmt: skip
for _module, _class, _methods in _WIRE:
    for _method, _names in _methods:
        _why = "gradients and weights cross the network as FP8 codes"
        SEAMS[f"{_class}.{_method}"] = _seam(_module, f"{_class}.{_method}", _names, why=_why)

_STATES = (
    ("deepspeed.runtime.base_optimizer", "ZeROOptimizer", (
        ("_configure_master_weights", ("self fp16_master_weights_and_gradients bf16_master_weights_and_gradients "
                                       "bf16_optimizer_states offload_enabled fp16_offload_validator "
                                       "bf16_offload_validator")),
        ("load_hp_checkpoint_state_from_checkpoint_dir", "self lp_groups_name checkpoint_dir"),
    )),
    (ENGINE, "DeepSpeedEngine", (
        ("_configure_fp16_optimizer", "self optimizer low_precision_dtype"),
        ("_configure_bf16_optimizer", "self optimizer"),
        ("_get_all_ckpt_names", "self checkpoints_path tag"),
        ("_get_zero_ckpt_name", "self checkpoints_path tag"),
    )),
    (STAGE_1_2, "DeepSpeedZeroOptimizer", (
        ("_link_all_hp_params", "self"),
        ("_lazy_init_hp_params_optimizer_state", "self"),
        ("_get_offload_gradient_dict", "self"),
        ("_get_preflattened_grad_partition", "self group_idx"),
        ("unscale_and_clip_grads", "self grad_groups_flat total_norm"),
        ("_optimizer_step", "self group_no"),
        ("refresh_fp32_params", "self"),
        ("has_overflow_partitioned_grads_serial", "self"),
        ("get_grad_norm_direct", "self gradients params norm_type"),
    )),
    (STAGE_3, "DeepSpeedZeroOptimizer_Stage3", (
        ("get_grad_norm_direct", "self gradients params norm_type"),
        ("_post_step", "self timer_names"),
        ("_prepare_fp32_grad_for_sub_group", "self sub_group_id"),
        ("unscale_and_clip_grads", "self sub_group_id total_norm"),
        ("_optimizer_step", "self sub_group_id"),
        ("_get_fp32_opt_state_partition", "self param release_swap_buffers optim_state_key"),
        ("_fp32_state_allgather", "self param fp32_state_partition"),
        ("_unflatten_partitioned_parameters", "self sub_group_id"),
        ("set_full_hp_param", "self value param optim_state_key"),
        ("set_local_hp_param", "self value param optim_state_key"),
    )),
    ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer", (
        ("get_grads_for_norm", "self for_clipping"),
        ("_link_all_hp_params", "self"),
        ("update_lp_params", "self"),
        ("step", "self closure"),
    )),
    ("deepspeed.runtime.pipe.engine", "PipelineEngine", (
        ("_bf16_reduce_grads", "self"),
        ("_exec_backward_pass", "self buffer_id"),
    )),
    ("deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer", (
        ("_skip_invalid_grad_norm", "self"),
        ("unscale_and_clip_grads", "self total_norm apply_scale"),
        ("_update_scale", "self skip"),
    )),
)  # fmt: skip
for _module, _class, _methods in _STATES:
    for _method, _names in _methods:
        _why = "states and masters are codes; clip and unscale are folded into the step"
        SEAMS.setdefault(f"{_class}.{_method}", _seam(_module, f"{_class}.{_method}", _names, why=_why))


def parameters_of(function: Callable) -> tuple[str, ...]:
    """Parameter names of a function, seen through decorators, also through those that forget functools.wraps."""
    names = tuple(inspect.signature(function).parameters)
    if names != ("args", "kwargs"):
        return names
    # DeepSpeed's nvtx decorator hides the function in its closure.
    for cell in getattr(function, "__closure__", None) or ():
        if inspect.isfunction(cell.cell_contents):
            return parameters_of(cell.cell_contents)
    return names


def difference(name: str) -> str | None:
    """What is different at one seam, in words; None when it is as expected."""
    seam = SEAMS[name]
    where = f"{seam.module}.{seam.path}"
    try:
        found = seam.find()
    except (ImportError, AttributeError) as error:
        return f"{where}: not there ({error}); needed because {seam.why}"
    if not seam.signatures:
        return None
    names = parameters_of(found)  # type: ignore[arg-type]
    if names in seam.signatures:
        return None
    expected = " or ".join("(" + ", ".join(known) + ")" for known in seam.signatures)
    return f"{where}: takes ({', '.join(names)}), expected {expected}; needed because {seam.why}"


def verify(names: Iterable[str] | None = None) -> None:
    """Raise SeamError with every difference of the installed DeepSpeed, or of the seams in `names` only."""
    found = [text for name in (SEAMS if names is None else names) if (text := difference(name)) is not None]
    if not found:
        return
    deepspeed = importlib.import_module("deepspeed")
    version = getattr(deepspeed, "__version__", "unknown")
    raise SeamError(
        "\n".join(
            [
                f"DeepSpeed {version} differs from the releases that ds_fp8 knows (fp8: 0.17.6 to 0.19.8, msamp: 0.19.8):",
                *(f"  {text}" for text in found),
                "  Install DeepSpeed 0.19.8, or a newer ds_fp8; or set msamp (and, where that does not help, fp8) to enabled: false.",
            ]
        )
    )
