"""One training on real text, in a process of its own: `parity_job.py '<json>'`; under torchrun one rank of several.

Pretraining, or fine-tuning of a base with all weights or with LoRA. The learning rate rises, falls along a cosine to a
tenth, and then stays at a very small one (the tail), where formats that are too coarse for their updates stand still.
Writes everything it has found so far to `out` at every evaluation.

Keys: out, data (folder of `parity_corpus`), kind (`pretrain`, `tune`, `lora`), sections, seed, depth, width, head_size,
vocabulary, context, sequences (of one optimizer step, over all ranks), steps, warmup, lr, tail, tail_lr, stage,
eval_every, eval_sequences, base (file of a state_dict to begin with), save (where to write one half way), telemetry
(folder), compile.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpt_job import CUDA, DEVICE, start_one_rank, wait
from gpt_model import GPT

MOVED = ("blocks.0.qkv.weight", "blocks.{middle}.up.weight", "blocks.{last}.down.weight")
"""Weights whose motion in the tail is measured, on their masters."""


def mean_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight).flatten(0, 1).float(), targets.flatten())


class TextGPT(GPT):
    """Takes tokens (sequences, context + 1), returns the mean loss."""

    loss_of = staticmethod(mean_loss)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens[:, :-1]) + self.place.weight
        for block in self.blocks:
            x = block(x)
        return self.loss_of(self.norm(x), self.head.weight, tokens[:, 1:])


class Text:
    """Windows of context + 1 tokens: those of a rank in the seed's order, and the held-out ones in theirs."""

    def __init__(self, job: dict[str, Any], rank: int, world_size: int):
        part = "train" if job["kind"] == "pretrain" else "tune"
        held = "heldout" if job["kind"] == "pretrain" else "tune_heldout"
        self.size, self.rank, self.world_size = job["context"], rank, world_size
        self.tokens = np.fromfile(f"{job['data']}/{part}.bin", np.uint16)
        self.held = np.fromfile(f"{job['data']}/{held}.bin", np.uint16)
        self.each = job["sequences"] // world_size
        steps = job["steps"] + job["tail"]
        windows = (len(self.tokens) - 1) // self.size
        rng = np.random.default_rng(job["seed"])
        self.passes = steps * job["sequences"] / windows
        order = np.concatenate([rng.permutation(windows) for _ in range(math.ceil(self.passes))])
        self.order = order[: steps * job["sequences"]].reshape(steps, world_size, self.each)

    def windows(self, tokens: np.ndarray, places: np.ndarray) -> torch.Tensor:
        rows = np.stack([tokens[place * self.size : place * self.size + self.size + 1] for place in places])
        found = torch.from_numpy(rows.astype(np.int32))
        return (found.pin_memory() if CUDA else found).to(DEVICE, non_blocking=True).long()

    def batch(self, step: int) -> torch.Tensor:
        return self.windows(self.tokens, self.order[step, self.rank])

    def held_out(self, sequences: int) -> list[torch.Tensor]:
        """This rank's share of at most `sequences` held-out windows, in full batches."""
        whole = min(sequences, (len(self.held) - 1) // self.size) // (self.each * self.world_size)
        places = np.arange(whole * self.each * self.world_size).reshape(whole, self.world_size, self.each)
        return [self.windows(self.held, row[self.rank]) for row in places]


def learning_rate(job: dict[str, Any], step: int) -> float:
    if step >= job["steps"]:
        return job["tail_lr"]
    if step < job["warmup"]:
        return job["lr"] * (step + 1) / job["warmup"]
    share = (step - job["warmup"]) / max(job["steps"] - job["warmup"], 1)
    return job["lr"] * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def config_of(job: dict[str, Any], world_size: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": job["sequences"] // world_size,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": job["stage"]},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": job["lr"], "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True, "fused": CUDA},
        },
    }
    config |= json.loads(json.dumps(job["sections"]))
    if "fp8" in config:
        config["fp8"]["compile"] = bool(job.get("compile"))
        every = max(job["steps"] // 10, 1)
        config["fp8"]["telemetry"] = {"enabled": True, "interval": every, "path": job["telemetry"]}
    return config


def make_model(job: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(job["seed"])
    sizes = [job[key] for key in ("depth", "width", "vocabulary", "context", "head_size")]
    with torch.device(DEVICE):
        model: Any = TextGPT(*sizes)
    if job.get("base"):
        model.load_state_dict(torch.load(job["base"], map_location=DEVICE, weights_only=True))
    model = model.bfloat16()
    if job.get("compile"):
        model.loss_of = torch.compile(mean_loss)
    if job["kind"] == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["qkv", "out", "up", "down"]))
    return model


class Training:
    def __init__(self, job: dict[str, Any]):
        import deepspeed

        import ds_fp8

        ds_fp8.activate()
        if not CUDA:  # only inference uses it, and its build takes most of a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if CUDA else "gloo")
        self.job, self.dist = job, torch.distributed
        self.rank, self.world_size = self.dist.get_rank(), self.dist.get_world_size()
        self.text = Text(job, self.rank, self.world_size)
        self.model = make_model(job)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        config = config_of(job, self.world_size)
        self.engine = deepspeed.initialize(model=self.model, model_parameters=trained, config=config)[0]
        if job.get("compile") and "fp8" not in config:
            for module in self.model.modules():
                if type(module).__name__ == "Block":
                    module.compile()
        self.held = self.text.held_out(job["eval_sequences"])
        numel = sum(parameter.numel() for parameter in self.model.parameters())
        self.found: dict[str, Any] = {"parameters": numel, "ranks": self.world_size, "state": "started", "evals": []}
        self.found |= {"passes over the text": round(self.text.passes, 2), "losses": []}
        self.losses: list[torch.Tensor] = []
        self.spent = 0.0

    def write(self, **values: Any) -> None:
        self.found |= values
        if self.losses:
            self.found["losses"] += [round(loss, 4) for loss in torch.stack(self.losses).tolist()]
            self.losses.clear()
        if self.rank == 0:
            path = Path(self.job["out"])
            path.with_suffix(".tmp").write_text(json.dumps(self.found))
            path.with_suffix(".tmp").replace(path)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss of the held-out windows over all ranks, in the mode that the engine is in."""
        loss = torch.stack([self.engine(tokens).float() for tokens in self.held]).mean()
        self.dist.all_reduce(loss)
        return round(float(loss) / self.world_size, 5)

    def look(self, step: int) -> None:
        self.engine.eval()
        loss = self.evaluate()
        self.engine.train()
        self.found["evals"].append([step, loss])
        self.write(state="trains", step=step)

    def steps(self, begin: int, end: int) -> None:
        wait()
        start = time.perf_counter()
        for step in range(begin, end):
            for group in self.engine.optimizer.param_groups:
                group["lr"] = learning_rate(self.job, step)
            loss = self.engine(self.text.batch(step))
            self.engine.backward(loss)
            self.engine.step()
            self.losses.append(loss.detach().float())
        wait()
        self.spent += time.perf_counter() - start

    def masters(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        last = self.job["depth"] - 1
        named = {name.removeprefix("base_model.model."): parameter for name, parameter in self.model.named_parameters()}
        wanted = [name.format(middle=self.job["depth"] // 2, last=last) for name in MOVED]
        found = {name: safe_get_full_fp32_param(named[name]) for name in wanted if name in named}
        return {name: value.detach().float().clone() for name, value in found.items() if value is not None}

    def run(self) -> None:
        job = self.job
        self.look(0)
        warm = min(3, job["steps"])  # compiles
        self.steps(0, warm)
        self.spent = 0.0
        self.write(state="trains", step=warm)
        done = warm
        while done < job["steps"]:
            now = min((done // job["eval_every"] + 1) * job["eval_every"], job["steps"])
            self.steps(done, now)
            self.look(now)
            if job.get("save") and self.rank == 0 and done < job["steps"] // 2 <= now:
                torch.save(self.engine.module.state_dict(), job["save"] + ".part")
                Path(job["save"] + ".part").replace(job["save"])
            done = now
        before = self.masters()
        self.steps(done, done + job["tail"])
        self.look(done + job["tail"])
        after = self.masters()
        moved = {name: float((after[name] - before[name]).square().mean().sqrt()) for name in after}
        steps = job["steps"] + job["tail"] - warm
        speed = round(steps * job["sequences"] * job["context"] / self.spent)
        in_training = self.evaluate()  # the engine trains: forwards in FP8, as in the steps
        peak = round(torch.cuda.max_memory_allocated() / 1e9, 2) if CUDA else 0
        tail = {"moved in the tail": moved, "eval as in training": in_training}
        self.write(state="done", **tail, **{"tokens per s": speed, "peak GB": peak, "operands": self.operands()})
        self.dist.barrier()

    def operands(self) -> dict[str, list[float]]:
        """`layer:role` -> [mean and largest share flushed to zero, looks at which it was clamped, largest `used`]."""
        path = Path(self.job["telemetry"]) / f"telemetry_rank{self.rank}.jsonl"
        if not path.exists():
            return {}
        from ds_fp8.telemetry import read_jsonl_log

        readings: dict[str, list[dict[str, Any]]] = {}
        for event in read_jsonl_log(path):
            for reading in event.get("readings", []):
                readings.setdefault(f"{reading['fqn']}:{reading['role']}", []).append(reading)
        found = {}
        for name, rows in readings.items():
            lost = [row["underflow"] or 0.0 for row in rows]
            used = [float(row["used"]) for row in rows]
            clamped = sum(each > 1 + 2**-20 for each in used)
            found[name] = [float(f"{each:.3g}") for each in (sum(lost) / len(lost), max(lost), clamped, max(used))]
        return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also without an installed ds_fp8
    start_one_rank()
    if CUDA:
        torch.cuda.set_device(DEVICE)
    torch.set_float32_matmul_precision("high")
    Training(json.loads(sys.argv[1])).run()
