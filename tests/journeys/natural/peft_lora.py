"""PEFT first, then Transformers."""

import sys

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed
import tiny

set_seed(0)
model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny.LLAMA))
data = [{"input_ids": row, "labels": row} for row in tiny.counting()]
model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
arguments = TrainingArguments(output_dir="out", deepspeed=sys.argv[1], **tiny.training_arguments())
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
tiny.print_losses(trainer)
