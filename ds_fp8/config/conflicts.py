"""Features that cannot be used together with our sections, by name and with the reason.

The other party is always one of DeepSpeed's own features. `msamp` replaces the optimizer, its states, the master
weights and the communication, so other features that replace one of them are refused. `fp8` alone replaces layers only
and works with nearly everything. Rules as in `rules.py`.
"""

from __future__ import annotations

from typing import Any

from ..algorithms import ALGORITHMS, REFUSED_OPTIONS, labels, moments_of
from .facts import offload_device, optimizer_type, section, zero_stage
from .rules import Found, Rule, fp8_of, level_of, msamp_of

ONE_BIT_OPTIMIZERS = frozenset({"onebitadam", "zerooneadam", "onebitlamb"})


def deepcompile(data: dict[str, Any]) -> Found:
    """DeepCompile moves ZeRO's collectives into a compiled graph, where neither layers nor wire can be met."""
    if section(data, "compile").get("deepcompile") is True and (fp8_of(data) or msamp_of(data)):
        yield (
            ("compile", "deepcompile"),
            (
                "DeepCompile schedules ZeRO's collectives inside a compiled graph that bypasses FP8 layers and wire; "
                "set it to false (torch.compile of the model is fine)"
            ),
        )


def tensor_parallel(data: dict[str, Any]) -> Found:
    """AutoTP puts layers of its own in the place of nn.Linear, and its ranks hold different parts of a model."""
    size = section(data, "tensor_parallel").get("autotp_size", 1)
    if (fp8_of(data) or msamp_of(data)) and isinstance(size, (int, float)) and size > 1:
        yield (
            ("tensor_parallel", "autotp_size"),
            (
                f"{size} splits every nn.Linear into layers of DeepSpeed's own (LinearLayer, LinearAllreduce), which "
                "fp8 does not convert, over ranks that msamp takes for equal; set it to 1, or leave both sections out"
            ),
        )


def zenflow(data: dict[str, Any]) -> Found:
    """ZenFlow splits the optimizer between device and host."""
    if msamp_of(data) and section(data, "zero_optimization").get("zenflow") not in (None, "auto"):
        yield (
            ("zero_optimization", "zenflow"),
            ("ZenFlow brings its own optimizer and update schedule, msamp does too; remove one of them"),
        )


def super_offload(data: dict[str, Any]) -> Found:
    """SuperOffload runs the optimizer in a process of its own."""
    offload = section(section(data, "zero_optimization"), "offload_optimizer")
    if msamp_of(data) and offload.get("super_offload") is True:
        yield (
            ("zero_optimization", "offload_optimizer", "super_offload"),
            ("SuperOffload runs its own CPU Adam in another process, which knows no 8-bit states; set it to false"),
        )


def nvme_states(data: dict[str, Any]) -> Found:
    """DeepSpeed's NVMe swapper moves states of the master's size and dtype."""
    if msamp_of(data) and offload_device(data, "offload_optimizer") == "nvme":
        yield (
            ("zero_optimization", "offload_optimizer", "device"),
            (
                "nvme swaps states of the master's size and dtype, quantized values and scales have neither; use cpu, "
                "where msamp's states take a third of the memory"
            ),
        )


def partial_offload(data: dict[str, Any]) -> Found:
    """Twin-Flow offload steps one part of the optimizer on the host and one on the device."""
    offload = section(section(data, "zero_optimization"), "offload_optimizer")
    ratio = offload.get("ratio", 1.0)
    if (
        msamp_of(data)
        and isinstance(ratio, (int, float))
        and ratio < 1.0
        and offload.get("device") not in (None, "none")
    ):
        yield (
            ("zero_optimization", "offload_optimizer", "ratio"),
            (f"{ratio} splits the step between two optimizers, msamp has one; set ratio to 1.0"),
        )


def one_bit_optimizers(data: dict[str, Any]) -> Found:
    """1-bit optimizers compress the gradient wire themselves."""
    name = optimizer_type(data)
    if msamp_of(data) and name and name.lower() in ONE_BIT_OPTIMIZERS:
        yield ("optimizer", "type"), f"'{name}' compresses gradients itself, msamp does too; use Adam or AdamW"


def other_optimizers(data: dict[str, Any]) -> Found:
    """msamp stores the states of a few algorithms."""
    name = optimizer_type(data)
    if msamp_of(data) and name and name.lower() not in ALGORITHMS.keys() | ONE_BIT_OPTIMIZERS:
        yield ("optimizer", "type"), f"msamp keeps the states of {labels()}, not of '{name}'; use one of these"


def states_that_are_not(data: dict[str, Any]) -> Found:
    """A format of a state that the algorithm does not keep would be ignored."""
    name, given = optimizer_type(data), msamp_of(data) or {}
    for moment in ("exp_avg", "exp_avg_sq"):
        if moment not in moments_of(name) and given.get(moment) not in (None, "auto"):
            yield ("msamp", moment), f"'{name}' keeps no {moment}, so its format has no effect; remove it"


def refused_options(data: dict[str, Any]) -> Found:
    """Options that would change the numbers, or that the step cannot keep."""
    given = section(section(data, "optimizer"), "params")
    for name, reason in REFUSED_OPTIONS.items():
        if msamp_of(data) and given.get(name) is True:
            yield ("optimizer", "params", name), f"not available with msamp ({reason}); set it to false"


def elastic_checkpoint(data: dict[str, Any]) -> Found:
    """DeepSpeed's elastic checkpoints of stage 3."""
    if msamp_of(data) and zero_stage(data) == 3 and _zero(data, "elastic_checkpoint"):
        yield (
            ("zero_optimization", "elastic_checkpoint"),
            "DeepSpeed has dropped it in stage 3; set it to false and use universal checkpoints",
        )


def sixteen_bit_masters(data: dict[str, Any]) -> Found:
    """DeepSpeed's own 16-bit masters and states are chosen by msamp.master and msamp.exp_avg instead."""
    if not msamp_of(data):
        return
    for name, key, instead in (
        ("fp16", "fp16_master_weights_and_grads", 'msamp "master": "fp16"'),
        ("bf16", "bf16_master_weights_and_grads", 'msamp "master": "split24"'),
        ("bf16", "bf16_optimizer_states", 'msamp "exp_avg": "bf16", "exp_avg_sq": "bf16"'),
    ):
        if section(data, name).get(key) is True:
            yield (name, key), f"msamp stores masters and states itself; set it to false and say {instead}"


def quantized_gradients(data: dict[str, Any]) -> Found:
    """ZeRO++ sends gradients as 4-bit integers."""
    level = level_of(data)
    if level and level.gradient_wire != "none" and _zero(data, "zero_quantized_gradients"):
        yield (
            ("zero_optimization", "zero_quantized_gradients"),
            (f"sends gradients in int4, msamp in {level.gradient_wire}; set it to false, or gradient_wire to none"),
        )


def quantized_weights(data: dict[str, Any]) -> Found:
    """ZeRO++ sends weights as 8-bit integers, rounded once more than O3's."""
    level = level_of(data)
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if level and level.weight_wire != "none" and _zero(data, key):
            yield (
                ("zero_optimization", key),
                ("sends weights in int8, msamp the layers' own e4m3 values; set it to false, or weight_wire to none"),
            )


def secondary_partition(data: dict[str, Any]) -> Found:
    """hpZ keeps a second 16-bit copy of the weights inside each node."""
    level = level_of(data)
    size = section(data, "zero_optimization").get("zero_hpz_partition_size", 1)
    if level and level.weight_wire != "none" and isinstance(size, (int, float)) and size > 1:
        yield (
            ("zero_optimization", "zero_hpz_partition_size"),
            (
                f"{size} keeps a second 16-bit copy of weights that msamp gathers as e4m3 values; set it to 1, or "
                "weight_wire to none"
            ),
        )


def communication_dtype(data: dict[str, Any]) -> Found:
    """communication_data_type names the dtype of a reduction that FP8 values replace."""
    level = level_of(data)
    name = data.get("communication_data_type")
    if (
        level
        and level.gradient_wire != "none"
        and level.gradient_wire_scope != "inter_node"
        and name not in (None, "auto")
    ):
        yield (
            ("communication_data_type",),
            (f"{name!r} is replaced by msamp's gradient wire ({level.gradient_wire}) wherever FP8 travels"),
        )


def torch_adam_states(data: dict[str, Any]) -> Found:
    """torch_adam chooses between two implementations that msamp replaces both."""
    if msamp_of(data) and section(section(data, "optimizer"), "params").get("torch_adam") is True:
        yield (
            ("optimizer", "params", "torch_adam"),
            "has no effect: msamp brings its own Adam with the same hyper-parameters",
        )


def _zero(data: dict[str, Any], key: str) -> bool:
    return section(data, "zero_optimization").get(key) is True


CONFLICTS: tuple[Rule, ...] = (
    deepcompile,
    tensor_parallel,
    zenflow,
    super_offload,
    nvme_states,
    partial_offload,
    one_bit_optimizers,
    other_optimizers,
    states_that_are_not,
    refused_options,
    elastic_checkpoint,
    sixteen_bit_masters,
    quantized_gradients,
    quantized_weights,
    secondary_partition,
)

REPLACED: tuple[Rule, ...] = (communication_dtype, torch_adam_states)
"""Rules whose findings are warnings: DeepSpeed's key loses its effect, and nothing else happens."""
