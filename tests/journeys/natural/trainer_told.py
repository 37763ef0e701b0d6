"""A Trainer in whose script nothing says DeepSpeed: `accelerate launch --use_deepspeed` does."""

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
import tiny

set_seed(0)
model = LlamaForCausalLM(LlamaConfig(**tiny.LLAMA))
data = [{"input_ids": row, "labels": row} for row in tiny.counting()]
trainer = Trainer(model, TrainingArguments("out", **tiny.training_arguments()), train_dataset=data)
trainer.train()
tiny.print_losses(trainer)
