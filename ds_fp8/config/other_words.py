"""What other tools call things: the Trainer, Accelerate, Transformer Engine, MS-AMP. Each word with ours, or with the
reason.

Only words that are no slip of a known one stand here; those are found by their spelling (`suggest`).
"""

from __future__ import annotations

SYNONYMS = {
    "skip": "exclude",
    "ignore": "exclude",
    "modules_to_not_convert": "exclude",
    "skip_modules": "exclude",
    "level": "opt_level",
    "optimization_level": "opt_level",
    "name": "type",
    "project_name": "project",
    "entity": "team",
    "run_name": "job_name",
    "logdir": "output_path",
}
"""What people call a key, where the key itself is known and that word is not."""

VALUES = {
    ("recipe", "delayedscaling"): "delayed",
    ("recipe", "float8currentscaling"): "current",
    ("recipe", "float8blockscaling"): "block",
    ("recipe", "mxfp8blockscaling"): "mxfp8",
    ("recipe", "nvfp4blockscaling"): "nvfp4",
    ("backend", "te"): "transformer_engine",
    ("rounding", "sr"): "stochastic",
    ("rounding", "rne"): "nearest",
    ("rounding", "rtn"): "nearest",
}
"""(key, what people write there, its spelling levelled) -> the value."""

CURES = {
    ("fp8_format", "E5M2"): "its two mantissa bits are too coarse for activations and "
    "weights. Use HYBRID, which takes E5M2 for gradients only",
    ("fp8_format", "FP8"): "FP8 is two formats; use HYBRID (E4M3 forward, E5M2 backward) or E4M3",
    ("exp_avg_sq", "int8"): "its steps are evenly spaced, and the roots of a block span decades: small ones would be "
    "lost. Use fp16, or e4m3_expanded for 8 bits; int8 is for exp_avg",
    ("backend", "MSAMP"): 'MS-AMP is a section of its own; write "msamp": {"enabled": true, "opt_level": "O2"}',
    ("backend", "AO"): "torchao is not among them; leave backend out",
}
"""Values that people are known to try, each with the reason why not."""

MOVED = {
    ("fp8", "use_autocast_during_eval"): "unknown key; ds_fp8 calls it 'eval'",
    ("fp8", "use_mxfp8_block_scaling"): 'unknown key; ds_fp8 writes it "recipe": "mxfp8"',
    ("fp8", "amax_history_length"): "unknown key; did you mean 'amax_history_len'?",
    ("fp8", "fp8_recipe"): "unknown key; did you mean 'recipe'?",
    ("fp8", "format"): "unknown key; did you mean 'fp8_format'?",
    ("msamp", "optimization_level"): "unknown key; did you mean 'opt_level'?",
    ("fp16", "opt_level"): "unknown key; apex's levels stand in its section `amp`, MS-AMP's in `msamp`",
    ("compile", "backend"): "unknown key; give torch.compile's backend to engine.compile(backend=...)",
    ("zero_optimization", "cpu_offload_params"): 'unknown key; write "offload_param": {"device": "cpu"}',
    ("zero_optimization", "cpu_offload_optimizer"): 'unknown key; write "offload_optimizer": {"device": "cpu"}',
}
"""Names that other tools use for our keys."""

SCHEDULES = {
    "linear": "WarmupDecayLR",
    "cosine": "WarmupCosineLR",
    "constant_with_warmup": "WarmupLR",
    "constant": "WarmupLR with warmup_min_lr equal to warmup_max_lr",
}
"""The Trainer's lr_scheduler_type -> DeepSpeed's scheduler/type."""

TOP_LEVEL = {
    "learning_rate": "optimizer/params/lr",
    "adam_beta1": "optimizer/params/betas",
    "adam_beta2": "optimizer/params/betas",
    "adam_epsilon": "optimizer/params/eps",
    "optim": "optimizer/type",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "per_gpu_train_batch_size": "train_micro_batch_size_per_gpu",
    "global_batch_size": "train_batch_size",
    "lr_scheduler_type": "scheduler/type",
    "warmup_steps": "scheduler/params/warmup_num_steps",
    "num_warmup_steps": "scheduler/params/warmup_num_steps",
    "warmup_ratio": "scheduler/params/warmup_num_steps, as a number of steps",
    "gradient_checkpointing": "the script or the Trainer; DeepSpeed's own are options in activation_checkpointing",
    "mixed_precision": '"bf16": {"enabled": true}, and for FP8 "fp8": {"enabled": true} beside it',
    "torch_dtype": '"bf16": {"enabled": true}',
    "precision": '"bf16": {"enabled": true}',
    "fp8_format": "fp8/fp8_format",
    "opt_level": "msamp/opt_level",
    "zero_stage": "zero_optimization/stage",
    "offload_optimizer_device": "zero_optimization/offload_optimizer/device",
    "offload_param_device": "zero_optimization/offload_param/device",
    "offload_optimizer_nvme_path": "zero_optimization/offload_optimizer/nvme_path",
    "offload_param_nvme_path": "zero_optimization/offload_param/nvme_path",
    "zero3_init_flag": "Accelerate's own file: it is no key of DeepSpeed's",
    "zero3_save_16bit_model": "zero_optimization/stage3_gather_16bit_weights_on_model_save",
    "deepspeed_config_file": "Accelerate's own file: it names this one",
}
"""Argument of the Trainer, or key of Accelerate's file -> where DeepSpeed's JSON has it."""
