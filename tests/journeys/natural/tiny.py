"""What the natural scripts share: sizes of a tiny model and text that is easy to learn. Imports torch when it is
used.
"""

from __future__ import annotations

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def counting(rows: int = 64, length: int = 32):
    """Token ids [rows, length] that count up from a random start."""
    import torch

    return (torch.randint(0, 64, (rows, 1)) + torch.arange(length)) % 64


def training_arguments(**more) -> dict:
    """What every Trainer here is given: on the CPU, six steps, each loss logged, no files."""
    return {
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "bf16": True,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }


def print_losses(trainer) -> None:
    if trainer.is_world_process_zero():
        print("LOSSES", *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), flush=True)
