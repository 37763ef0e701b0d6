"""A script for the Hugging Face Trainer: a tiny Llama from a configuration, nothing downloaded, FP8 from the JSON."""

from __future__ import annotations

import sys

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for 40 s; only inference uses it
torch.manual_seed(0)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(
    LlamaConfig(**SIZES, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
)
tokens = (torch.randint(0, 64, (64, 1)) + torch.arange(32)) % 64  # counting: easy to learn
data = [{"input_ids": row, "labels": row} for row in tokens]
arguments = TrainingArguments(
    output_dir=sys.argv[2],
    deepspeed=sys.argv[1],
    per_device_train_batch_size=8,
    max_steps=6,
    learning_rate=1e-2,
    bf16=True,
    logging_steps=1,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
)
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
if trainer.is_world_process_zero():
    print("LOSSES", arguments.world_size, *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
