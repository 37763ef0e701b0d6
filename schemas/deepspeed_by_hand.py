"""The part of DeepSpeed's configuration that has no model: its top level, and sections read key by key.

Written from DeepSpeed's documentation and the keys its parser asks for; `tests/config/test_deepspeed_schema.py` fails
when a newer DeepSpeed asks for a key that is missing here. The cures of removed keys are ours.
"""

from __future__ import annotations

from typing import Any


def _entry(kind: Any, description: str, **more: Any) -> dict[str, Any]:
    return {"description": description, "type": kind, **more}


def _choice(description: str, *choices: Any) -> dict[str, Any]:
    return {"description": description, "enum": list(choices)}


_DTYPES = ("fp32", "fp16", "bf16", None)

TOP_LEVEL: dict[str, dict[str, Any]] = {
    "$schema": _entry("string", "For editors; DeepSpeed ignores it."),
    "train_batch_size": _entry(
        "integer", "Samples per optimizer step over all ranks.", minimum=1, **{"x-unit": "samples"}
    ),
    "train_micro_batch_size_per_gpu": _entry(
        "integer", "Samples per rank and forward pass.", minimum=1, **{"x-unit": "samples"}
    ),
    "gradient_accumulation_steps": _entry("integer", "Forward passes per optimizer step.", minimum=1),
    "managed_gradient_accumulation": _entry("boolean", "DeepSpeed counts micro-batches itself.", default=True),
    "steps_per_print": _entry(
        ["number", "null"], "Steps between two progress lines; Accelerate writes infinity.", minimum=0
    ),
    "gradient_clipping": _entry("number", "Largest gradient norm; 0 turns clipping off.", minimum=0, default=1.0),
    "prescale_gradients": _entry("boolean", "Scale gradients before the all-reduce.", default=False),
    "gradient_predivide_factor": _entry(
        "number", "Part of the averaging that is done before the all-reduce.", default=1.0
    ),
    "gradient_allreduce_op": _choice("Average or sum gradients over ranks.", "mean", "sum"),
    "communication_data_type": _choice("Dtype of gradient reductions.", *_DTYPES),
    "seq_parallel_communication_data_type": _choice("Dtype of sequence-parallel communication.", *_DTYPES),
    "disable_allgather": _entry("boolean", "Leave out the all-gather of updated weights.", default=False),
    "dump_state": _entry("boolean", "Print the engine's state once.", default=False),
    "disable_python_gc": _entry("boolean", "Turn Python's garbage collector off.", default=False),
    "dataloader_drop_last": _entry("boolean", "Drop the last incomplete batch.", default=False),
    "vocabulary_size": _entry(["integer", "null"], "For an alignment warning only."),
    "wall_clock_breakdown": _entry("boolean", "Time forward, backward and step.", default=False),
    "memory_breakdown": _entry("boolean", "Print memory after each phase.", default=False),
    "log_level": _entry(["string", "null"], "DeepSpeed's log level."),
    "zero_allow_untested_optimizer": _entry("boolean", "Let ZeRO run with any optimizer.", default=False),
    "zero_force_ds_cpu_optimizer": _entry(
        "boolean", "Insist on DeepSpeed's CPU optimizer when offloading.", default=True
    ),
    "use_data_before_expert_parallelism": _entry("boolean", "Order of data and expert ranks.", default=False),
    "sequence_parallel_size": _entry("integer", "Ranks that share one sequence (Ulysses).", minimum=1),
    "allgather_size": _entry("number", "Bucket of the old boolean form of zero_optimization."),
    "datastates_ckpt": _entry(["object", "boolean"], "DataStates asynchronous checkpoint engine."),
    "data_efficiency": _entry("object", "Curriculum learning, data sampling, random layer token drop."),
    "expert_parallel": _entry("object", "Automatic expert parallelism."),
    "optimizer": _entry("object", "Optimizer by name, with its parameters."),
    "scheduler": _entry("object", "Learning-rate schedule by name, with its parameters."),
    "activation_checkpointing": _entry("object", "Recompute activations in the backward pass."),
    "flops_profiler": _entry("object", "Count FLOPs and time of modules."),
    "autotuning": _entry("object", "Search for the best ZeRO stage and micro-batch."),
    "pipeline": _entry("object", "Pipeline parallelism."),
    "aio": _entry("object", "Asynchronous NVMe input and output."),
    "checkpoint": _entry("object", "Checkpoint writing."),
    "data_types": _entry("object", "Dtypes of accumulation, parameters and buffers."),
    "torch_autocast": _entry("object", "torch.autocast around the model."),
    "timers": _entry("object", "Throughput timer."),
    "zero_optimization": {"description": "ZeRO: which of optimizer states, gradients and parameters are sharded."},
    "bf16": {"description": "Train in bfloat16."},
    "bfloat16": {"description": "The old name of bf16."},
    "fp16": {"description": "Train in float16 with loss scaling."},
    "tensorboard": {"description": "Monitor: TensorBoard."},
    "wandb": {"description": "Monitor: Weights & Biases."},
    "csv_monitor": {"description": "Monitor: CSV files."},
    "comet": {"description": "Monitor: Comet."},
    "comms_logger": {"description": "Log every collective."},
    "compile": {"description": "torch.compile and DeepCompile."},
    "hybrid_engine": {"description": "One engine for training and generation."},
    "tensor_parallel": {"description": "Automatic tensor parallelism."},
    "weight_quantization": {"description": "Weight quantisation for inference."},
}


def _open(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "x-tolerant": True, "properties": properties}


_FLAG = {"type": "boolean"}
_COUNT = {"type": "integer"}
_NUMBER = {"type": "number"}
_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_OBJECT = {"type": "object"}

BY_HAND: dict[str, dict[str, Any]] = {
    "optimizer": _open(type=_TEXT, params=_OBJECT, legacy_fusion=_FLAG),
    "scheduler": _open(type=_TEXT, params=_OBJECT),
    "activation_checkpointing": _open(
        partition_activations=_FLAG,
        contiguous_memory_optimization=_FLAG,
        cpu_checkpointing=_FLAG,
        number_checkpoints={"type": ["integer", "null"]},
        synchronize_checkpoint_boundary=_FLAG,
        profile=_FLAG,
    ),
    "flops_profiler": _open(
        enabled=_FLAG,
        recompute_fwd_factor=_NUMBER,
        profile_step=_COUNT,
        module_depth=_COUNT,
        top_modules=_COUNT,
        detailed=_FLAG,
        output_file=_TEXT_OR_NULL,
    ),
    "pipeline": _open(
        stages={"type": ["integer", "string"]},
        partition=_TEXT,
        seed_layers=_FLAG,
        activation_checkpoint_interval=_COUNT,
        pipe_partitioned=_FLAG,
        grad_partitioned=_FLAG,
        use_reentrant=_FLAG,
    ),
    "aio": _open(
        block_size=_COUNT,
        queue_depth=_COUNT,
        intra_op_parallelism=_COUNT,
        thread_count=_COUNT,
        single_submit=_FLAG,
        overlap_events=_FLAG,
        use_gds=_FLAG,
    ),
    "checkpoint": _open(
        tag_validation={"type": "string"},
        load_universal=_FLAG,
        use_node_local_storage=_FLAG,
        parallel_write=_OBJECT,
        checkpoint_serialization=_FLAG,
        writer={"type": ["object", "null"]},
    ),
    "data_types": _open(
        grad_accum_dtype={"enum": list(_DTYPES)},
        param_dtype={"enum": list(_DTYPES)},
        buffer_dtype={"enum": list(_DTYPES)},
        keep_in_fp32_modules={"type": ["array", "string"]},
    ),
    "torch_autocast": _open(
        enabled=_FLAG, dtype=_TEXT, lower_precision_safe_modules={"type": ["array", "null"], "items": _TEXT}
    ),
    "timers": _open(throughput=_OBJECT),
}
"""Sections that DeepSpeed reads key by key; unknown keys in them are ignored in silence."""

_GONE = "DeepSpeed refuses this key; remove it"

REMOVED: dict[str, str] = {
    "amp": "Apex AMP is gone; use bf16, fp16 or torch_autocast",
    "nebula": f"Nebula checkpoints are gone. {_GONE}",
    "compression_training": f"the compression library is gone. {_GONE}",
    "quantize_training": f"quantised training by groups is gone. {_GONE}",
    "sparse_gradients": "sparse gradients of dense embeddings are gone; build the embedding with sparse=True instead",
    "eigenvalue": f"it belonged to quantize_training, which is gone. {_GONE}",
    "sparse_attention": f"sparse attention is gone. {_GONE}",
    "elasticity": "elastic training is gone; set the batch sizes directly",
    "graph_harvesting": f"graph harvesting is gone. {_GONE}",
    "curriculum_learning": "moved to data_efficiency/data_sampling/curriculum_learning",
    "progressive_layer_drop": f"progressive layer drop is gone. {_GONE}",
}
"""Top-level keys that DeepSpeed raises an error for, and the cure."""

REMOVED_ZERO: dict[str, str] = {
    "mics_shard_size": f"MiCS is gone. {_GONE}",
    "mics_hierarchical_params_gather": f"MiCS is gone. {_GONE}",
    "zeropp_loco_param": "LoCo is gone; remove it for ZeRO++ gradients without error feedback",
}
"""The same inside `zero_optimization`."""
