"""What a script does with a feature of DeepSpeed: small jobs on two ranks, each gives this rank's losses."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from torch import nn

Job = Callable[[dict[str, Any]], list[float]]
STEPS = range(3)
WORDS = 21


class Net(nn.Module):
    """FP8 layers between parameters of odd sizes, so that partitions end anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 32)
        self.up = nn.Linear(32, 144)
        self.norm = nn.LayerNorm(144)
        self.down = nn.Linear(144, 48, bias=False)
        self.head = nn.Linear(48, 7)

    def forward(self, tokens: torch.Tensor, curriculum_seqlen: int | None = None) -> torch.Tensor:
        tokens = tokens[:, :curriculum_seqlen]
        return self.head(torch.relu(self.down(self.norm(torch.relu(self.up(self.table(tokens)))))))


def new_engine(config: dict[str, Any], model: nn.Module | None = None, **given: Any) -> Any:
    torch.manual_seed(0)
    # DeepSpeed asks whether the CPU multiplies fp16 *fast*; torch multiplies it everywhere.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    engine = deepspeed.initialize(model=model or Net(), config=copy.deepcopy(config), **given)[0]
    NOTED.append(what_runs(engine))
    return engine


NOTED: list[str] = []
"""For each engine of the job, what of ours is in it: asked by the table whether a column was what it says."""


def what_runs(engine: Any) -> str:
    layers = sum(type(module).__name__.startswith("Fp8") for module in engine.module.modules())
    states = any(cls.__module__.startswith("ds_fp8") for cls in type(engine.optimizer).__mro__)
    return f"{'layers ' if layers else ''}{'states' if states else ''}".strip()


def loss_of(engine: Any, step: int, micro: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
    tokens = torch.randint(0, WORDS, (4, 16), generator=draw)
    out = engine(tokens).float()
    targets = (tokens * 5 % 7)[:, : out.shape[1]]
    return nn.functional.cross_entropy(out.flatten(0, 1), targets.flatten())


def train(engine: Any, steps: range = STEPS) -> list[float]:
    losses = []
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine, step, micro)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def as_usual(config: dict[str, Any]) -> list[float]:
    return train(new_engine(config))


def client_optimizer(kind: Callable[..., torch.optim.Optimizer]) -> Job:
    def job(config: dict[str, Any]) -> list[float]:
        torch.manual_seed(0)
        model = Net()
        config = {key: value for key, value in config.items() if key != "optimizer"}
        return train(new_engine(config, model, optimizer=kind(model.parameters(), lr=1e-2)))

    return job


def _in_context(name: str) -> Job:
    def job(config: dict[str, Any]) -> list[float]:
        engine, losses = new_engine(config), []
        for step in STEPS:
            with getattr(engine, name)():
                for micro in range(2):
                    loss = loss_of(engine, step, micro)
                    engine.backward(loss)
                    losses.append(loss.item())
            if name == "no_sync":
                loss = loss_of(engine, step, 2)
                engine.backward(loss)
            engine.step()
        return losses

    return job


no_sync, coalesced = _in_context("no_sync"), _in_context("coalesce_grad_reduction")


def zero_init(config: dict[str, Any]) -> list[float]:
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(config)):
        model = Net()
    return train(new_engine(config, model))


def gathered(config: dict[str, Any]) -> list[float]:
    engine = new_engine(config)
    losses = train(engine, range(1))
    with deepspeed.zero.GatheredParameters([engine.module.up.weight], modifier_rank=0):
        if dist.get_rank() == 0:
            engine.module.up.weight.data.mul_(0.5)
    return losses + train(engine, range(1, 3))


def fragments(config: dict[str, Any]) -> list[float]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param

    engine = new_engine(config)
    losses = train(engine, range(1))
    weight = engine.module.up.weight
    assert safe_get_full_optimizer_state(weight, "exp_avg").shape == safe_get_full_fp32_param(weight).shape
    safe_set_full_fp32_param(weight, safe_get_full_fp32_param(weight) * 0.5)
    return losses + train(engine, range(1, 3))


def _shared_folder() -> Path:
    place = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(place, src=0)
    return Path(str(place[0]))


def resumed(config: dict[str, Any]) -> list[float]:
    folder = _shared_folder()
    engine = new_engine(config)
    losses = train(engine, range(2))
    engine.save_checkpoint(str(folder))
    goes_on = train(engine, range(2, 4))
    engine.destroy()
    engine = new_engine(config)
    engine.load_checkpoint(str(folder))
    again = train(engine, range(2, 4))
    assert again == goes_on, f"resumed {again}, not interrupted {goes_on}"
    return losses + again


def evaluated(config: dict[str, Any]) -> list[float]:
    engine = new_engine(config)
    losses = train(engine)
    engine.eval()
    with torch.no_grad():
        losses.append(loss_of(engine, 9).item())
    return losses


def compiled(config: dict[str, Any]) -> list[float]:
    """Traced by torch.compile; without a compiler behind it, which would take half a minute."""
    engine = new_engine(config)
    engine.compile(backend="aot_eager")
    return train(engine)


def checkpointed_activations(config: dict[str, Any]) -> list[float]:
    class Again(Net):
        def forward(self, tokens: torch.Tensor, curriculum_seqlen: int | None = None) -> torch.Tensor:
            from torch.utils.checkpoint import checkpoint

            x = torch.relu(self.up(self.table(tokens)))
            return self.head(checkpoint(lambda y: torch.relu(self.down(self.norm(y))), x, use_reentrant=False))

    torch.manual_seed(0)
    return train(new_engine(config, Again()))


def experts(config: dict[str, Any]) -> list[float]:
    """DeepSpeed's MoE layer, two experts on two ranks."""
    from deepspeed.moe.layer import MoE

    class Mixture(Net):
        def __init__(self) -> None:
            super().__init__()
            expert = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48))
            self.moe = MoE(48, expert, num_experts=2, ep_size=2, k=1, min_capacity=64, use_rts=False)

        def forward(self, tokens: torch.Tensor, curriculum_seqlen: int | None = None) -> torch.Tensor:
            x = torch.relu(self.down(self.norm(torch.relu(self.up(self.table(tokens))))))
            return self.head(self.moe(x)[0])

    torch.manual_seed(0)
    return train(new_engine(config, Mixture()))


def pipeline(config: dict[str, Any]) -> list[float]:
    from deepspeed.pipe import LayerSpec, PipelineModule

    torch.manual_seed(0)
    layers = [LayerSpec(nn.Linear, 16, 32), nn.ReLU(), LayerSpec(nn.Linear, 32, 16)]
    model = PipelineModule(layers, num_stages=2, loss_fn=lambda out, y: (out - y).float().pow(2).mean())
    engine = new_engine({**config, "gradient_accumulation_steps": 2}, model)
    found = []
    for step in STEPS:
        draw = torch.Generator().manual_seed(step)
        pairs = [tuple(torch.randn(4, 16, generator=draw).bfloat16() for _ in "xy") for _ in range(2)]
        found.append(float(engine.train_batch(data_iter=iter(pairs))))
    return found


def tensor_parallel(config: dict[str, Any]) -> list[float]:
    """AutoTP shards a Llama over both ranks, which then see the same data."""
    import transformers

    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    engine, losses = new_engine(config, model), []
    for step in STEPS:
        tokens = torch.randint(0, WORDS, (4, 16), generator=torch.Generator().manual_seed(step))
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def universal(config: dict[str, Any]) -> list[float]:
    """Saved, converted by DeepSpeed's own tool, loaded: near the job that went on."""
    import sys

    from deepspeed.checkpoint import ds_to_universal

    folder = _shared_folder()
    engine = new_engine(config)
    losses = train(engine, range(2))
    engine.save_checkpoint(str(folder), tag="a")
    goes_on = train(engine, range(2, 4))
    engine.destroy()
    if dist.get_rank() == 0:
        sys.argv = ["ds_to_universal", "--input_folder", str(folder / "a"), "--output_folder", str(folder / "u")]
        sys.argv += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
        with contextlib.redirect_stdout(None):
            ds_to_universal.main(ds_to_universal.parse_arguments())
    dist.barrier()
    engine = new_engine({**config, "checkpoint": {"load_universal": True}})
    engine.load_checkpoint(str(folder), tag="u")
    again = train(engine, range(2, 4))
    assert max(abs(a - b) for a, b in zip(again, goes_on, strict=True)) < 0.05, (again, goes_on)
    return losses + again
