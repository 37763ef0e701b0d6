"""A Trainer's whole life: `python trainer_life.py ds.json out [checkpoint]`; evaluates, saves, keeps the best,
generates.
"""

import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
import torch
import tiny

config, out, *checkpoint = sys.argv[1:]
set_seed(0)
model = LlamaForCausalLM(LlamaConfig(**tiny.LLAMA))
data = [{"input_ids": row, "labels": row} for row in tiny.counting(96)]
times = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
common = tiny.training_arguments(max_steps=6, warmup_steps=1, per_device_train_batch_size=4)
arguments = TrainingArguments(output_dir=out, deepspeed=config, **{**common, **times, **best})
trainer = Trainer(model=model, args=arguments, train_dataset=data[:64], eval_dataset=data[64:])
trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
loss = trainer.evaluate()["eval_loss"]
prompt = torch.tensor([[5, 6, 7, 8]])
trainer.model.eval()
with torch.no_grad():
    generated = trainer.model.generate(
        prompt, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
trainer.save_model(f"{out}/final")
if trainer.is_world_process_zero():
    tiny.print_losses(trainer)
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    print("EVAL", *evals, "LAST", loss, "BEST", trainer.state.best_model_checkpoint)
    print("GENERATED", *generated[0].tolist())
    unset_hf_deepspeed_config()  # else ZeRO 3 would partition the next model too
    baseline = LlamaForCausalLM.from_pretrained(f"{out}/final", dtype=torch.bfloat16).eval()
    names = {type(module).__name__ for module in baseline.modules()}
    assert "Fp8Linear" not in names, "a saved model is an unmodified model"
    with torch.no_grad():
        again = baseline.generate(prompt, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt))
        batch = torch.stack([row["input_ids"] for row in data[64:]])
        print("AGAIN", *again[0].tolist(), "LOSS", baseline(input_ids=batch, labels=batch).loss.item())
    print("FILES", *sorted(path.name for path in Path(out, "final").iterdir()), flush=True)
