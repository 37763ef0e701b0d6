"""The Hugging Face Trainer on a GPU, as a user's script calls it: `python natural_trainer.py WAY ds.json`."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

WAYS = {
    "liger": {"use_liger_kernel": True},
    "graphs": {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
}

way, config = sys.argv[1:]
replays = []
replay = torch.cuda.CUDAGraph.replay
torch.cuda.CUDAGraph.replay = lambda graph: replays.append(graph) or replay(graph)

torch.manual_seed(0)
sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=64, use_cache=False))
tokens = (torch.randint(0, 64, (128, 1)) + torch.arange(64)) % 64
data = [{"input_ids": row, "labels": row} for row in tokens]
arguments = TrainingArguments(
    output_dir="out",
    deepspeed=config,
    per_device_train_batch_size=8,
    max_steps=8,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    bf16=True,
    logging_steps=1,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
    **WAYS[way],
)
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
print("LOSSES", *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), flush=True)
calls = [getattr(module.forward, "__func__", module.forward) for module in model.modules()]
print("LIGER", sum("liger_kernel" in call.__module__ for call in calls), flush=True)
print("REPLAYS", len(replays), flush=True)
print("FP8 LAYERS", sum(hasattr(module, "layer_state") for module in model.modules()), flush=True)
