"""TRL's SFT, whose first import brings datasets, Accelerate and Transformers in its own order."""

import sys

from trl import SFTConfig, SFTTrainer
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
import tiny

set_seed(0)
words = {f"{number}": number for number in range(64)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", bos_token="1", eos_token="2")
texts = [" ".join(map(str, row)) for row in tiny.counting().tolist()]
model = LlamaForCausalLM(LlamaConfig(**tiny.LLAMA))
arguments = SFTConfig(output_dir="out", deepspeed=sys.argv[1], max_length=32, **tiny.training_arguments())
trainer = SFTTrainer(
    model=model, args=arguments, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer
)
trainer.train()
tiny.print_losses(trainer)
