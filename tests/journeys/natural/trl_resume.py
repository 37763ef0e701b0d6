"""SFT with LoRA that is interrupted: `python trl_resume.py ds.json out [checkpoint]`; the adapter is loaded over an
unmodified model.
"""

import sys

from trl import SFTConfig, SFTTrainer
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
import torch
import tiny

config, out, *checkpoint = sys.argv[1:]
set_seed(0)
tokenizer = Tokenizer(models.WordLevel({f"{number}": number for number in range(64)}, unk_token="0"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", bos_token="1", eos_token="2")
rows = tiny.counting()
data = Dataset.from_dict({"text": [" ".join(map(str, row)) for row in rows.tolist()]})
LlamaForCausalLM(LlamaConfig(**tiny.LLAMA)).save_pretrained("base")
common = tiny.training_arguments(save_strategy="steps", save_steps=3)
trainer = SFTTrainer(
    model="base",
    args=SFTConfig(output_dir=out, deepspeed=config, max_length=32, **common),
    train_dataset=data,
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    processing_class=tokenizer,
)
trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
tiny.print_losses(trainer)
trainer.save_model(f"{out}/adapter")
trainer.model.eval()
baseline = AutoPeftModelForCausalLM.from_pretrained(f"{out}/adapter", dtype=torch.bfloat16).eval()
with torch.no_grad():
    ours, theirs = (model(input_ids=rows[:8], labels=rows[:8]).loss.item() for model in (trainer.model, baseline))
print("ADAPTER", ours, theirs, flush=True)
