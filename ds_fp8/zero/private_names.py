"""Every private name of DeepSpeed that we stand on, with its form in each release.

DeepSpeed moves every few weeks, and a hook on a method that has changed its meaning trains on in silence, wrong. So
nothing is hooked, read or written that is not listed: methods with their parameters in `METHODS`, attributes in the
`TOUCHED` of the module that uses them (`touched.py`), imports in the import statements themselves. Three looks:

    verify(...)       before a job starts: the methods of the installed package; for a release that was never tested,
                      everything, by its source
    check_instance    when a wrapper has been specialised: what its mixins declare is there on the finished object
    differences(...)  everything, in any source tree, sdist or wheel: `ds_fp8 doctor --deepspeed PATH`

Where a release lacks a name or spells it otherwise, an adapter stands in (`adapters`); `since` and `until` say so here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .. import releases
from ..errors import PrivateNameError
from ..releases import numbers
from .deepspeed_source import DeepSpeedSource
from .touched import FP8, MSAMP, OWNERS, declared, imports


@dataclass(frozen=True)
class Method:
    """A method that we override, wrap or call by position.

    owner    class, as `touched.OWNERS` names it
    name     of the method
    form     parameter names in the newest release; empty where any will do
    until    last release of an older form -> its parameter names
    since    first release that has it; older ones are served by an adapter. Empty: all
    feature  `fp8`: every job needs it; `msamp`: jobs with that section
    why      what we do there
    """

    owner: str
    name: str
    form: tuple[str, ...]
    why: str
    feature: str = MSAMP
    until: dict[str, tuple[str, ...]] = field(default_factory=dict)
    since: str = ""

    @property
    def where(self) -> str:
        module, cls = OWNERS[self.owner]
        return f"{module}.{cls}.{self.name}" if cls else f"{module}.{self.name}"

    def form_in(self, version: str) -> tuple[str, ...] | None:
        """Parameter names that DeepSpeed `version` has to have; None when it need not have the method."""
        if self.since and numbers(version) < numbers(self.since):
            return None
        older = sorted((numbers(last), form) for last, form in self.until.items() if numbers(version) <= numbers(last))
        return older[0][1] if older else self.form


def _of(owner: str, why: str, *entries: str | tuple, feature: str = MSAMP) -> list[Method]:
    """Entries are `name(a b c)`, or a tuple of that, and `since` or (last release, older parameters)."""
    found = []
    for entry in entries:
        text, *rest = (entry,) if isinstance(entry, str) else entry
        name, _, form = text.rstrip(")").partition("(")
        since = next((item for item in rest if isinstance(item, str)), "")
        until = {item[0]: tuple(item[1].split()) for item in rest if isinstance(item, tuple)}
        found.append(Method(owner, name, tuple(form.split()), why, feature, until, since))
    return found


_MASTERS = "fp16_master_weights_and_gradients bf16_master_weights_and_gradients bf16_optimizer_states"

METHODS: tuple[Method, ...] = (
    *_of("Engine", "the job is read and its layers are swapped before the cast, the broadcast and ZeRO's hooks",
        "_configure_distributed_model(self model)", feature=FP8),
    *_of("Engine", "the optimizer of the JSON or of the client becomes ours",
        "_configure_optimizer(self client_optimizer model_parameters)",
        "_configure_basic_optimizer(self model_parameters)",
        "_configure_zero_optimizer(self optimizer)",
        feature=FP8),
    *_of("TorchAutocast",
        "it marks parameters for the 16-bit wire by the class of their module, so it looks before the swap too",
        "init_autocast_params(engine dtype torch_autocast_lower_precision_safe_modules)", feature=FP8),
    *_of("Engine", "weights have changed: cached quantized values are stale, telemetry is due",
        ("_take_model_step(self lr_kwargs)", ("0.19.7", "self lr_kwargs block_eigenvalue")),
        "backward(self loss retain_graph scale_wrt_gas)",
        feature=FP8),
    *_of("Engine", "scales and histories travel with the checkpoint, and files are looked at before they are loaded",
        "save_checkpoint(self save_dir tag client_state save_latest exclude_frozen_parameters)",
        "load_checkpoint(self load_dir tag load_module_strict load_optimizer_states load_lr_scheduler_states "
        "load_module_only custom_load_fn)",
        "_get_all_ckpt_names(self checkpoints_path tag)",
        "_get_zero_ckpt_name(self checkpoints_path tag)",
        feature=FP8),
    *_of("Engine", "a compiler is given DeepSpeed's hooks in ZeRO 3",
        ("compile(self backend compile_kwargs schedule compiled_autograd_enabled)",
         ("0.18.2", "self backend compile_kwargs schedule")), feature=FP8),
    *_of("CheckpointEngine", "a file that was looked at is not read twice",
        "load(self path map_location)", feature=FP8),
    *_of("Engine", "16-bit weights are brought back before they are saved, and quantized values forgotten after a load",
        "save_16bit_model(self save_dir save_filename exclude_frozen_parameters)",
        "load_module_state_dict()"),
    *_of("Engine", "stage 0 and BF16 have wrappers of ours",
        "_configure_fp16_optimizer(self optimizer low_precision_dtype)",
        "_configure_bf16_optimizer(self optimizer)"),
    *_of("Engine", "gradients of stage 0, BF16_Optimizer and the pipeline travel in FP8",
        "allreduce_bucket(self bucket dp_group dp_world_size)"),
    *_of("ZeroStage12", "gradients go to their owners in FP8",
        "average_tensor(self tensor communication_data_type)",
        "allreduce_and_scatter(self bucket communication_data_type numel_per_bucket log divide process_group)",
        (("allreduce_no_retain(self bucket communication_data_type numel_per_bucket rank log divide process_group "
         "output_bucket)"),
         ("0.19.7", "self bucket communication_data_type numel_per_bucket rank log divide process_group")),
        "gradient_reduction_w_predivide(self tensor communication_data_type)",
        "buffered_reduce_fallback(self rank grads communication_data_type elements_per_buffer log)",
        (("_buffered_reduce_fallback_preserving_fp32(self grads grad_params communication_data_type "
         "elements_per_buffer)"),
         "0.19.8"),
        ("_add_full_reduction_to_compact_grad_partition(self reduced_tensor communication_data_type)", "0.19.8"),
        ("_get_compact_grad_partition_slice(self group_idx partition_id param_id num_elements)", "0.19.8"),
        ("_add_to_grad_partition_buffer(output source)", "0.19.8"),
        "_clear_previous_reduced_grads(self)"),
    *_of("ZeroStage12", "weights are gathered in quantized form",
        "reduce_ready_partitions_and_remove_grads(self param i)",
        "_update_model_bit16_weights(self group_index)", "update_lp_params(self)", "_restore_from_bit16_weights(self)"),
    *_of("ZeroStage3", "gradients go to their owners in FP8",
        "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(self params_to_reduce communication_data_type)",
        "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads(self buffer_to_reduce communication_data_type)",
        ("_gradient_averaging_world_size(self params partition_world_size)", "0.19.3"),
        ("_get_param_partition_group(self param)", "0.19.3"),
        ("_get_param_partition_rank(self param)", "0.19.3"),
        ("_assert_same_partition_group(self params)", "0.19.3"),
        "get_param_id(self param)", "reduce_ready_partitions_and_remove_grads(self param)"),
    *_of("GatheredParameters", "released weights are whole inside it",
        "__init__(self params modifier_rank fwd_module enabled)", "__enter__(self)", "__exit__(self exc)"),
    *_of("ZeroOptimizer", "masters have the base dtype; universal checkpoints load into quantized values",
        (f"_configure_master_weights(self {_MASTERS} offload_enabled fp16_offload_validator bf16_offload_validator)",
         "0.18.3", ("0.19.0", f"self {_MASTERS} fp16_offload_validator bf16_fp32_offload_validator")),
        "load_hp_checkpoint_state_from_checkpoint_dir(self lp_groups_name checkpoint_dir)"),
    *_of("ZeroStage12", "states and masters are quantized; clip and unscale are folded into the step",
        "step(self closure)", "state_dict(self)",
        "load_state_dict(self state_dict_list load_optimizer_states load_from_fp32_weights checkpoint_folder "
        "load_serial param_shapes)",
        "_link_all_hp_params(self)", "_lazy_init_hp_params_optimizer_state(self)", "_get_offload_gradient_dict(self)",
        ("_get_preflattened_grad_partition(self group_idx)", "0.19.2"),
        "unscale_and_clip_grads(self grad_groups_flat total_norm)", "_optimizer_step(self group_no)",
        "refresh_fp32_params(self)", "has_overflow_partitioned_grads_serial(self)",
        "offload_states(self include device pin_memory non_blocking)",
        "get_grad_norm_direct(self gradients params norm_type)"),
    *_of("ZeroStage3", "states and masters are quantized; clip and unscale are folded into the step",
        "step(self closure)", "state_dict(self)",
        "load_state_dict(self state_dict_list load_optimizer_states load_from_fp32_weights checkpoint_folder "
        "load_serial param_shapes)",
        "get_grad_norm_direct(self gradients params norm_type)", "_post_step(self timer_names)",
        "_prepare_fp32_grad_for_sub_group(self sub_group_id)", "unscale_and_clip_grads(self sub_group_id total_norm)",
        "_optimizer_step(self sub_group_id)",
        "_get_fp32_opt_state_partition(self param release_swap_buffers optim_state_key)",
        "_fp32_state_allgather(self param fp32_state_partition)",
        "_unflatten_partitioned_parameters(self sub_group_id)",
        "set_full_hp_param(self value param optim_state_key)", "set_local_hp_param(self value param optim_state_key)",
        "get_hp_param_device(self param optim_state_key)", "_restore_from_bit16_weights(self)",
        "refresh_fp32_params(self)", "offload_states(self include device pin_memory non_blocking)"),
    *_of("Bf16", "states and masters are quantized",
        "get_grads_for_norm(self for_clipping)", "_link_all_hp_params(self)",
        "_lazy_init_hp_params_optimizer_state(self)", "update_lp_params(self)", "step(self closure)",
        "state_dict(self)",
        "load_state_dict(self state_dict_list checkpoint_folder load_optimizer_states load_from_fp32_weights "
        "load_serial param_shapes)",
        "_restore_from_bit16_weights(self)", "refresh_fp32_params(self)"),
    *_of("Stage0", "the model's parameters are their own masters",
        "step(self closure)", "state_dict(self)", "load_state_dict(self state_dict load_optimizer_states)",
        "refresh_fp32_params(self)", "zero_grad(self set_to_none)", "backward(self loss create_graph retain_graph)"),
)  # fmt: skip
"""In the order in which a job meets them."""


SINCE = {
    ("Engine", "bf16_master_weights_and_gradients"): "0.18.3",
    ("Bf16", "overflow"): "0.19.8",
    ("Engine", "bf16_optimizer_states"): "0.18.3",
    ("Stage0", "loss_scale_config"): "0.18.6",
    ("Stage0", "low_precision_dtype"): "0.18.6",
    ("ZeroStage12", "gradient_average"): "0.19.6",
    ("ZeroStage12", "round_robin_bit16_padding"): "0.19.7",
    ("Parameter", "_zero_padding"): "0.19.7",
}
"""(owner, attribute) -> first release that has it; older ones do without, or an adapter brings it."""


def needed(msamp: bool) -> tuple[Method, ...]:
    """What a job meets, with or without the section `msamp`."""
    return tuple(method for method in METHODS if msamp or method.feature == FP8)


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


def difference(method: Method, version: str, look: Callable[[Method], tuple[str, ...] | None]) -> str | None:
    """What is different at one method, in words; None when it is as expected. `look` gives its parameters."""
    expected = method.form_in(version)
    if expected is None:
        return None
    found = look(method)
    if found is None:
        return f"{method.where}: not there; needed because {method.why}"
    if expected in ((), found):
        return None
    return f"{method.where}: takes ({', '.join(found)}), expected ({', '.join(expected)}); needed because {method.why}"


def live(method: Method) -> tuple[str, ...] | None:
    """Parameters of a method in the package that is imported here."""
    module, cls = OWNERS[method.owner]
    try:
        home = importlib.import_module(module)
        return parameters_of(getattr(getattr(home, cls) if cls else home, method.name))
    except (ImportError, AttributeError):
        return None


def differences(source: DeepSpeedSource, *, msamp: bool = True, version: str | None = None) -> Iterator[str]:
    """Everything in which `source` is not what we know: methods, attributes, imports; one sentence each."""
    version = version or source.version or releases.DEEPSPEED[-1]

    def look(method: Method) -> tuple[str, ...] | None:
        module, cls = OWNERS[method.owner]
        return source.parameters(module, f"{cls}.{method.name}" if cls else method.name)

    for method in needed(msamp):
        if (text := difference(method, version, look)) is not None:
            yield text
    known = {(method.owner, method.name) for method in METHODS}
    for file, owner, name in declared(version):
        is_needed = msamp or not file.startswith("zero/") or file == "zero/autocast.py"
        is_needed = is_needed and numbers(version) >= numbers(SINCE.get((owner, name), ""))
        if is_needed and (owner, name) not in known and not _has(source, owner, name):
            module, cls = OWNERS[owner]
            yield f"{module}{'.' + cls if cls else ''}: has no {name}, which {file} uses"
    for file, module, name in imports(version):
        is_needed = msamp or not file.startswith("zero/") or file == "zero/autocast.py"
        if is_needed and name not in source.names(module) and source.module(f"{module}.{name}") is None:
            yield f"{module}: has no {name}, which {file} imports"


def _has(source: DeepSpeedSource, owner: str, name: str) -> bool:
    module, cls = OWNERS[owner]
    if not cls:
        return name in source.hung_on(*module.split())
    # What a class does not set itself, its engine may hang on it.
    return name in source.attributes(module, cls) or name in source.hung_on(module)


@functools.cache
def installed_differences(version: str, msamp: bool) -> tuple[str, ...]:
    """`differences` of the installed package: two seconds, so once per process and not for every engine."""
    return tuple(differences(DeepSpeedSource.installed(), msamp=msamp, version=version))


def verify(*, msamp: bool = True) -> str:
    """Raise PrivateNameError with every difference of the installed DeepSpeed; returns a line to print, mostly empty.

    A release newer than the newest tested one is compared in everything that its source tells.
    """
    import deepspeed

    version = str(getattr(deepspeed, "__version__", "unknown"))
    untested = numbers(version) not in {numbers(one) for one in releases.DEEPSPEED}
    found = [text for method in needed(msamp) if (text := difference(method, version, live)) is not None]
    if numbers(version) < numbers(releases.DEEPSPEED[0]):
        found.insert(0, f"it is older than {releases.DEEPSPEED[0]}, the oldest release that ds_fp8 knows")
    elif untested:
        found = list(dict.fromkeys([*found, *installed_differences(version, msamp)]))
    if found:
        oldest, newest = releases.DEEPSPEED[0], releases.DEEPSPEED[-1]
        head = f"DeepSpeed {version} differs from the releases that ds_fp8 knows ({oldest} to {newest}):"
        cure = f"  Install DeepSpeed {newest}, or a newer ds_fp8; or set msamp (and, where that does not help, fp8) to"
        raise PrivateNameError("\n".join([head, *(f"  {text}" for text in found), f"{cure} enabled: false."]))
    return f"DeepSpeed {version} was not tested with this ds_fp8; its private names are as expected" if untested else ""
