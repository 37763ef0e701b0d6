"""The Hugging Face Trainer."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
import tiny

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**tiny.LLAMA))
data = [{"input_ids": row, "labels": row} for row in tiny.counting()]
arguments = TrainingArguments(output_dir="out", deepspeed=sys.argv[1], **tiny.training_arguments())
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
tiny.print_losses(trainer)
