"""The support matrix: each feature of DeepSpeed, what a script and its JSON do for it, and what comes of it.

A cell *works* when the job ends, with finite losses near those of DeepSpeed alone and with our layers and states in the
engine; it is *refused* when all ranks raise one of our errors with the words given here; it *fails as DeepSpeed does*
where DeepSpeed alone ends in an error, and the cell in the same. Anything else is wrong. `absent` means the plugin
without its sections: losses equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COLUMNS: dict[str, dict[str, Any]] = {
    "absent": {},
    "fp8": {"fp8": {"enabled": True, "amax_history_len": 4}},
    "O1": {"msamp": {"enabled": True, "opt_level": "O1"}},
    "O2": {"msamp": {"enabled": True, "opt_level": "O2"}},
    "O3": {"msamp": {"enabled": True, "opt_level": "O3"}},
}
LEVELS = ("O1", "O2", "O3")


@dataclass(frozen=True)
class Feature:
    """One row.

    config   added to the JSON of `base`; None takes a key away
    job      name of a function of `jobs.py`, or `client:NAME` for an optimizer of torch
    refused  column -> words of the reason
    alone    words of the error in which DeepSpeed alone ends on two CPU ranks; columns that are neither refused nor in
             `runs` end in the same error
    because  what is missing there, where the error does not say it
    runs     columns that run all the same
    quick    part of every CI run
    near     how far a loss may lie from DeepSpeed's
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    job: str = "as_usual"
    refused: Mapping[str, str] = field(default_factory=dict)
    alone: str = ""
    because: str = ""
    runs: tuple[str, ...] = ()
    quick: bool = False
    near: float = 0.15


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, **keys}}


def by_msamp(words: str) -> dict[str, str]:
    return dict.fromkeys(LEVELS, words)


def optimizer(name: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": name, "params": {"lr": 1e-2, **params}}}


NEEDS_ZERO = {"O3": "needs FP8 weights in ZeRO"}
CPU = {"device": "cpu"}
CPU_ADAM = {**optimizer("AdamW"), "zero_force_ds_cpu_optimizer": True}
"""DeepSpeed's own, in C++: compiled when it is first asked for, once for all rows."""

FEATURES: dict[str, Feature] = {
    "ZeRO 0": Feature(zero(0), refused={"O3": "stage"}),
    "ZeRO 1": Feature(zero(1)),
    "ZeRO 2": Feature(zero(2)),
    "ZeRO 3": Feature(zero(3)),
    "fp16, ZeRO 0": Feature({**zero(0), "bf16": None, "fp16": {"enabled": True, "initial_scale_power": 8}},
                            refused={"fp8": "trains wrongly", "O3": "stage"}),
    "fp16, ZeRO 2": Feature({**zero(2), "bf16": None, "fp16": {"enabled": True, "initial_scale_power": 8}}),
    "fp16, ZeRO 3": Feature({**zero(3), "bf16": None, "fp16": {"enabled": True, "initial_scale_power": 8}}),
    "fp32, ZeRO 2": Feature({**zero(2), "bf16": None}),
    "torch_autocast": Feature({**zero(2), "bf16": None, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    "gradient accumulation": Feature({**zero(2), "gradient_accumulation_steps": 2}),
    "fp32 accumulation (data_types)": Feature({**zero(2), "data_types": {"grad_accum_dtype": "fp32"}}),
    "no gradient clipping": Feature({**zero(2), "gradient_clipping": None}),
    "overlap_comm": Feature(zero(2, overlap_comm=True)),
    "round_robin_gradients": Feature(zero(2, round_robin_gradients=True)),
    "reduce_scatter off": Feature(zero(2, reduce_scatter=False)),
    "communication_data_type": Feature({**zero(2), "communication_data_type": "fp32"}),
    "offload_optimizer, ZeRO 2": Feature(zero(2, offload_optimizer=CPU)),
    "offload_optimizer with DeepSpeedCPUAdam": Feature({**zero(2, offload_optimizer=CPU), **CPU_ADAM}),
    "offload_optimizer, ZeRO 3": Feature(zero(3, offload_optimizer=CPU)),
    "offload_param": Feature(zero(3, offload_param=CPU, offload_optimizer=CPU)),
    "offload_optimizer to NVMe": Feature(zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}),
                                         refused=by_msamp("nvme"), alone="async_io", because="needs libaio"),
    "Twin-Flow (offload ratio)": Feature({**zero(3, offload_optimizer={**CPU, "ratio": 0.5}), **CPU_ADAM},
                                         refused=by_msamp("splits")),
    "no_sync": Feature(zero(1), "no_sync"),
    "coalesce_grad_reduction": Feature(zero(2), "coalesced"),
    "zero.Init": Feature(zero(3), "zero_init"),
    "GatheredParameters": Feature(zero(3), "gathered"),
    "fragment API": Feature(zero(2), "fragments"),
    "save and resume": Feature(zero(2), "resumed", quick=True),
    "elastic_checkpoint, save and resume": Feature(zero(2, elastic_checkpoint=True), "resumed",
                                                  refused={"fp8": "saved with zero_optimization/elastic_checkpoint"}, runs=LEVELS,
                                                  alone="AssertionError", because="its load asks for a step that torch's Adam keeps elsewhere"),
    "universal checkpoint": Feature(zero(2), "universal", quick=True),
    "evaluation": Feature(zero(2), "evaluated"),
    "activation checkpointing": Feature(zero(2), "checkpointed_activations"),
    "curriculum learning (top-level key)": Feature({**zero(2), "curriculum_learning": {
        "enabled": True, "curriculum_type": "seqlen", "min_difficulty": 8, "max_difficulty": 16,
        "schedule_type": "fixed_linear", "schedule_config": {"total_curriculum_step": 2, "difficulty_step": 8}}}, alone="has been removed"),
    "torch.compile": Feature(zero(2), "compiled"),
    "DeepCompile": Feature({**zero(3), "compile": {"deepcompile": True}},
                           refused={"fp8": "DeepCompile", **by_msamp("DeepCompile")}),
    "AutoTP": Feature({**zero(1), "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel",
                      refused={"fp8": "splits every nn.Linear", **by_msamp("splits every nn.Linear")}),
    "MoE (expert parallel)": Feature(zero(2), "experts"),
    "pipeline, ZeRO 1": Feature(zero(1), "pipeline"),
    "torch.optim.AdamW of the script": Feature(zero(2), "client:AdamW"),
    "torch.optim.SGD of the script": Feature({**zero(2), "zero_allow_untested_optimizer": True}, "client:SGD",
                                             refused=by_msamp("SGD")),
    "Adam": Feature({**zero(2), **optimizer("Adam", torch_adam=True)}),
    "Adagrad, save and resume, ZeRO 0": Feature({**zero(0), **optimizer("Adagrad")}, "resumed", refused=by_msamp("Adagrad"),
                                                alone="KeyError", because="torch's Adagrad makes its states for parameters that DeepSpeed replaces; the job trains, and cannot save"),
    "Adagrad, save and resume, ZeRO 2": Feature({**zero(2), **optimizer("Adagrad")}, "resumed", refused=by_msamp("Adagrad")),
    "Adagrad, save and resume, ZeRO 3": Feature({**zero(3), **optimizer("Adagrad")}, "resumed",
                                                refused={"fp8": "names every master twice", **by_msamp("Adagrad")},
                                                alone="match the size of optimizer's group", because="its load, after DeepSpeed has made the optimizer anew"),
    "Lion": Feature({**zero(2), **optimizer("Lion")}, alone="had not been implemented on CPU", because="FusedLion is for GPUs", runs=LEVELS),
    "Muon": Feature({**zero(2), **optimizer("Muon")}, refused=by_msamp("Muon")),
    "1-bit Adam": Feature({**zero(0), **optimizer("OneBitAdam", freeze_step=2)}, alone="not a supported DeepSpeed Optimizer"),
    "ZenFlow": Feature({**zero(2, offload_optimizer=CPU, zenflow={"topk_ratio": 0.5, "update_interval": 2,
                                                                  "select_strategy": "step", "select_interval": 2}), **CPU_ADAM},
                       refused=by_msamp("ZenFlow")),
    "SuperOffload": Feature(zero(3, offload_optimizer={**CPU, "super_offload": True}), refused=by_msamp("SuperOffload"),
                            alone="only supports NVIDIA CUDA GPUs"),
    "hpZ": Feature(zero(3, zero_hpz_partition_size=2), refused={"O3": "second 16-bit copy"}),
    "MiCS": Feature(zero(3, mics_shard_size=1), alone="has been removed"),
    "ZeRO++ quantized gradients": Feature(zero(3, zero_quantized_gradients=True), refused=by_msamp("int4"),
                                          alone="had not been implemented on CPU", because="its quantizer is for GPUs"),
    "ZeRO++ quantized weights": Feature(zero(3, zero_quantized_weights=True), refused={"O3": "int8"},
                                        alone="had not been implemented on CPU", because="its quantizer is for GPUs"),
    "16-bit masters (bf16)": Feature({**zero(2, offload_optimizer=CPU), **CPU_ADAM,
                                      "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
                                     refused=by_msamp("stores masters")),
    "elasticity": Feature({**zero(2), "train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": None,
                           "elasticity": {"enabled": True, "max_train_batch_size": 16, "micro_batch_sizes": [4],
                                          "min_gpus": 1, "max_gpus": 4, "version": 0.1}}, alone="has been removed"),
    "monitor (csv)": Feature({**zero(2), "csv_monitor": {"enabled": True, "output_path": "/tmp/ds_fp8_support", "job_name": "x"}}),
    "flops profiler": Feature({**zero(2), "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": "/dev/null"}}),
    "hybrid engine": Feature({**zero(2), "hybrid_engine": {"enabled": True}}),
    "learning rate scheduler": Feature({**zero(2), "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}}),
}  # fmt: skip


def configuration(feature: Feature, column: str) -> dict[str, Any]:
    """The JSON of one cell."""
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **optimizer("AdamW", torch_adam=True),
    }
    for key, value in {**feature.config, **COLUMNS.get(column, {})}.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = value
    return found
