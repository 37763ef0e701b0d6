"""TRL's trainers: `python trl_kinds.py KIND ds.json`; the reference model of DPO and GRPO comes from the same JSON."""

import sys

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)
import tiny

kind, config = sys.argv[1:]
set_seed(0)
tokenizer = Tokenizer(models.WordLevel({f"{number}": number for number in range(64)}, unk_token="0"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", bos_token="1", eos_token="2")
texts = [" ".join(map(str, row)) for row in tiny.counting().tolist()]
backwards = [" ".join(reversed(text.split())) for text in texts]
LlamaForCausalLM(LlamaConfig(**tiny.LLAMA)).save_pretrained("tiny_llama")
tokenizer.save_pretrained("tiny_llama")
model = "tiny_llama"
options = {"output_dir": "out", "deepspeed": config, **tiny.training_arguments()}
common = {"processing_class": tokenizer}
if kind == "sft_lora":
    data = Dataset.from_dict({"text": texts})
    arguments = SFTConfig(max_length=32, **options)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, peft_config=lora, **common)
elif kind in ("dpo", "dpo_lora"):
    rows = {"prompt": ["5 6 7"] * len(texts), "chosen": texts, "rejected": backwards}
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if kind == "dpo_lora" else None
    options["learning_rate"] = 1e-3
    arguments = DPOConfig(max_length=64, **options)
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=Dataset.from_dict(rows), peft_config=lora, **common)
elif kind == "reward":
    model = LlamaForSequenceClassification(LlamaConfig(**tiny.LLAMA, num_labels=1))
    rows = {"chosen": texts, "rejected": backwards}
    arguments = RewardConfig(max_length=64, **options)
    trainer = RewardTrainer(model=model, args=arguments, train_dataset=Dataset.from_dict(rows), **common)
else:
    options |= {"max_steps": 2, "beta": 0.1, "num_generations": 4, "max_completion_length": 8}
    arguments = GRPOConfig(**options)
    trainer = GRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [text[:20] for text in texts]}),
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        **common,
    )
trainer.train()
tiny.print_losses(trainer)
