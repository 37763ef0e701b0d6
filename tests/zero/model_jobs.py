"""Tiny transformers models that are no list of nn.Linear, trained by JSON on real ranks."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.engine.engine_jobs import config, full_weights, make_engine

WORDS, LENGTH = 96, 16


def build(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if name == "gpt2":
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drops))
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    mixture = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **mixture))


def tokens(rank: int, step: int) -> torch.Tensor:
    """Counting from somewhere: easy to learn."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return (torch.randint(0, WORDS, (8, 1), generator=generator) + torch.arange(LENGTH)) % WORDS


def steps(engine: Any, rank: int, first: int, last: int, loss_of: Any = lambda output: output.loss) -> list[float]:
    losses = []
    for step in range(first, last):
        batch = tokens(rank, step)
        loss = loss_of(engine(input_ids=batch, labels=batch))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def sections(level: str | None) -> dict[str, Any]:
    if level is None:
        return {}
    return {"fp8": {"enabled": True}, "msamp": {"enabled": True, "opt_level": level}}


def train_families(rank: int, world_size: int, stage: int, names: list[str], folder: str) -> dict[str, Any]:
    """For each model: losses in bf16, at O2 and at O3, and in eval mode; the last one saved in the middle and gone on
    with from the file.
    """
    import ds_fp8.engine
    from ds_fp8.zero.weights_released import is_released

    ds_fp8.activate()
    found: dict[str, Any] = {}
    for name in names:
        for level in (None, "O2", "O3"):
            settings = config(stage, **sections(level))
            if level == "O3" and not stage:
                continue
            last = level == ("O2" if not stage else "O3")
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                engine = make_engine(settings, build(name))
                result: dict[str, Any] = {"losses": steps(engine, rank, 0, 4), "said": said.getvalue()}
                result["released"] = sum(map(is_released, engine.module.parameters()))
                engine.module.eval()
                with torch.no_grad():
                    batch = tokens(rank, 99)
                    result["read"] = engine.module(input_ids=batch, labels=batch).loss.item()
                engine.module.train()
                if last:
                    engine.save_checkpoint(f"{folder}/{name}{stage}")
                    result["after"] = steps(engine, rank, 4, 6)
                    again = make_engine(settings, build(name))
                    again.load_checkpoint(f"{folder}/{name}{stage}")
                    result["resumed"] = steps(again, rank, 4, 6)
                    result["weights"] = {key: value.sum().item() for key, value in full_weights(engine).items()}
            found[f"{name} {level}"] = result
    return found


def llama() -> nn.Module:
    import transformers

    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))


def lora(base: nn.Module | None = None) -> nn.Module:
    import peft

    torch.manual_seed(0)
    model = llama() if base is None else base
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=64, target_modules="all-linear"))


def train_lora(rank: int, world_size: int, stages: list[int], folder: str) -> dict[str, Any]:
    """PEFT's LoRA with the base kept in 16 bits and in FP8: losses, a resumed run, adapters on disk, the merged
    model.
    """
    import ds_fp8.engine
    from ds_fp8.zero.weights_released import is_released

    ds_fp8.activate()
    found: dict[str, Any] = {}
    for stage in stages:
        for kept in ("high_precision", "fp8"):
            settings = config(stage, fp8={"enabled": True, "recipe": "current", "frozen_weights": kept})
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                engine = make_engine(settings, lora())
                result: dict[str, Any] = {"losses": steps(engine, rank, 0, 6)}
                result["released"] = sum(is_released(parameter) for parameter in engine.module.parameters())
                engine.save_checkpoint(f"{folder}/{kept}{stage}")
                engine.module.save_pretrained(f"{folder}/adapters{kept}{stage}-{rank}")
                result["adapters"] = sorted(
                    file.name for file in Path(f"{folder}/adapters{kept}{stage}-{rank}").iterdir()
                )
                result["after"] = steps(engine, rank, 6, 8)
                again = make_engine(settings, lora())
                again.load_checkpoint(f"{folder}/{kept}{stage}")
                result["resumed"] = steps(again, rank, 6, 8)
                engine.module.eval()
                batch = tokens(rank, 99)
                with torch.no_grad():
                    before = engine.module(input_ids=batch).logits.float()
                model = engine.module
                engine.destroy()
                merged = model.merge_and_unload()
                with torch.no_grad():
                    after = merged(input_ids=batch).logits.float()
            result["said"] = said.getvalue()
            result["merged_error"] = float((after - before).norm() / before.norm())
            result["merged_classes"] = sorted(
                {type(m).__name__ for m in merged.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
            )
            found[f"{kept} {stage}"] = result
    return found


def deepspeed_mixture() -> nn.Module:
    """DeepSpeed's own MoE layer, whose experts are a list of modules, between two Linears."""
    from deepspeed.moe.layer import MoE

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(WORDS, 32), nn.Linear(32, 32)
            self.moe = MoE(32, Expert(), num_experts=16, ep_size=2, k=1, min_capacity=8, use_rts=False)
            self.head = nn.Linear(32, WORDS)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            x, extra, _ = self.moe(self.embed(input_ids))
            logits = self.head(self.out(x))[:, :-1].float()
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()) + 0.01 * extra

    torch.manual_seed(0)
    return Net()


def train_expert_parallel(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """DeepSpeed's own MoE layer with its experts spread over both ranks, in bf16 and in FP8."""
    import ds_fp8.engine
    from ds_fp8.layers import Fp8Linear

    ds_fp8.activate()
    found: dict[str, Any] = {}
    for name, fp8 in (("bf16", {}), ("fp8", {"fp8": {"enabled": True, "recipe": "current"}})):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            engine = make_engine(config(stage, **fp8), deepspeed_mixture())
            losses = steps(engine, rank, 0, 4, lambda output: output)
        layers = [fqn for fqn, module in engine.module.named_modules() if isinstance(module, Fp8Linear)]
        found[name] = {"losses": losses, "said": said.getvalue(), "layers": layers}
    return found
