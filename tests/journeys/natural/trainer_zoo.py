"""The Trainer with one model of each kind, all tiny and random: `python trainer_zoo.py MODEL ds.json`."""

import sys

import torch
import transformers
from transformers import Trainer, TrainingArguments
import tiny


def decoder(name, **more):
    sizes = {**tiny.LLAMA, **more}
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))


EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}
MODELS = {
    "Llama": lambda: decoder("Llama"),
    "Qwen3": lambda: decoder("Qwen3", head_dim=16),
    "Qwen3Moe": lambda: decoder("Qwen3Moe", head_dim=16, num_experts=4, moe_intermediate_size=32, **EXPERTS),
    "Mixtral": lambda: decoder("Mixtral", num_local_experts=4, **EXPERTS),
    "GPT2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    ),
    "Bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    ),
    "T5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    ),
    "ViT": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, num_labels=16,
        )
    ),
}  # fmt: skip

name, config = sys.argv[1:]
torch.manual_seed(0)
model = MODELS[name]()
if name == "ViT":
    labels = torch.arange(64) % 16
    data = [{"pixel_values": torch.full((3, 32, 32), label / 8 - 1), "labels": label} for label in labels]
else:
    data = [{"input_ids": row, "labels": row} for row in tiny.counting()]
arguments = TrainingArguments(output_dir="out", deepspeed=config, **tiny.training_arguments())
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
tiny.print_losses(trainer)
