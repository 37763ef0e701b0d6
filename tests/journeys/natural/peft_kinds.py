"""PEFT's kinds of adapters in the Trainer: `python peft_kinds.py KIND ds.json`."""

import sys

from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed
import torch
import tiny

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(use_dora=True, **LORA),
    "modules_to_save": LoraConfig(modules_to_save=["lm_head"], **LORA),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
kind, config = sys.argv[1:]
set_seed(0)
model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny.LLAMA))
model = get_peft_model(model, KINDS[kind])
data = [{"input_ids": row, "labels": row} for row in tiny.counting()]
arguments = TrainingArguments(output_dir="out", deepspeed=config, **tiny.training_arguments())
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
tiny.print_losses(trainer)
trainer.save_model(f"adapter_{kind}")
if kind != "prompt":
    batch = torch.stack([row["input_ids"] for row in data[:8]])
    model.eval()
    with torch.no_grad():
        before = model(input_ids=batch).logits
        merged = model.merge_and_unload()
        after = merged(input_ids=batch).logits
    print("MERGED", type(merged.model.layers[0].mlp.up_proj).__name__, type(merged.lm_head).__name__)
    print("DIFFERENCE", ((after - before).norm() / before.norm()).item())
