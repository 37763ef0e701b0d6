"""The Trainer called in other ways than `trainer.py` does: `python trainer_ways.py WAY ds.json`."""

import json
import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import HfDeepSpeedConfig
import torch
import tiny


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(input_ids=inputs["input_ids"])
        logits, labels = outputs.logits[:, :-1].float(), inputs["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


def llama():
    return AutoModelForCausalLM.from_config(LlamaConfig(**tiny.LLAMA))


def compiled():
    """`torch_compile=True`; the default backend needs a compiler, this one traces in the same way."""
    common = tiny.training_arguments(torch_compile=True, torch_compile_backend="aot_eager")
    trainer = Trainer(llama(), TrainingArguments("out", deepspeed=config, **common), train_dataset=data)
    trainer.train()
    from torch._dynamo.utils import counters

    print("GRAPHS", counters["stats"]["unique_graphs"], flush=True)
    return trainer


def from_a_dict():
    arguments = TrainingArguments("out", deepspeed=json.loads(Path(config).read_text()), **tiny.training_arguments())
    trainer = Trainer(model_init=llama, args=arguments, train_dataset=data)
    trainer.train()
    return trainer


def parsed():
    words = (
        f"--output_dir out --deepspeed {config} --use_cpu --bf16 --max_steps 6 --logging_steps 1 --learning_rate 1e-2"
    )
    words += " --report_to none --save_strategy no --gradient_checkpointing --gradient_accumulation_steps 2"
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words.split())
    trainer = OwnLoss(llama(), arguments, train_dataset=data)
    trainer.train()
    return trainer


def seq2seq():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    common = tiny.training_arguments(predict_with_generate=True, generation_max_length=8)
    arguments = Seq2SeqTrainingArguments("out", deepspeed=config, **common)
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=data, eval_dataset=data[:8])
    trainer.train()
    print("EVAL", trainer.evaluate()["eval_loss"], trainer.predict(data[:8]).predictions.shape, flush=True)
    return trainer


def evaluated():
    """No training at all: DeepSpeed gets no optimizer, and the Trainer asks for ZeRO 3."""
    arguments = TrainingArguments("out", deepspeed=config, **tiny.training_arguments(max_steps=-1))
    trainer = Trainer(llama(), arguments, eval_dataset=data)
    print("LOSSES", trainer.evaluate()["eval_loss"], trainer.predict(data).metrics["test_loss"], flush=True)
    return trainer


def without_trainer():
    """`HfDeepSpeedConfig` and `from_pretrained` under ZeRO 3, then a loop by hand."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    llama().save_pretrained("whole")
    common = json.loads(Path(config).read_text())
    common |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}
    common |= {"bf16": {"enabled": True}, "gradient_clipping": 1.0}
    common["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    keep = HfDeepSpeedConfig(common)
    model = AutoModelForCausalLM.from_pretrained("whole", dtype=torch.bfloat16)
    assert keep.is_zero3() and hasattr(model.lm_head.weight, "ds_id"), "partitioned while it was loaded"
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=common)
    engine.train()  # from_pretrained gives a model in eval mode
    losses = []
    for step in range(6):
        batch = torch.stack([row["input_ids"] for row in data[8 * step : 8 * step + 8]])
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    print("LOSSES", *losses, flush=True)
    return engine


way, config = sys.argv[1:]
set_seed(0)
data = [{"input_ids": row, "labels": row} for row in tiny.counting()]
trainer = globals()[way]()
if way not in ("evaluated", "without_trainer"):
    tiny.print_losses(trainer)
