"""One DeepSpeed training of the GPT in a process of its own: `gpt_job.py '<json>'` prints one line of JSON at the end.

Without a GPU it runs on the CPU with gloo: small sizes rehearse the whole path there.
A process of its own gives each configuration a clean card, and an out-of-memory error ends only itself.
Under torchrun (RANK and its kin are set) it is one rank of several, a GPU each; rank 0 prints, tokens are those of all
ranks. Keys: depth, width, vocabulary, context, micro_batch, gas, steps, stage, sections (merged into the DeepSpeed
config), plugin (false leaves ds_fp8 out), recompute, steps_timed_apart (times the optimizer step by itself), profile (a
file that gets the kernels and the host's operations of one more step, by time, and `.step` those of the optimizer's
step), llama (arguments of LlamaConfig: transformers' LlamaForCausalLM with random weights in the GPT's place), lora
(rank: every Linear of its decoder layers is frozen and gets an adapter), compiled (`engine`: engine.compile();
`blocks`: each decoder layer), peer (`torchao` or `accelerate`, which converts the layers instead of us).
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also without an installed ds_fp8

CUDA = torch.cuda.is_available()
DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if CUDA else "cpu"


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def start_one_rank() -> None:
    """A world of one, unless a launcher has made another."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def config_of(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": job["micro_batch"],
        "gradient_accumulation_steps": job["gas"],
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": job["stage"]},
        # DeepSpeed's own FusedAdam did not build on this image; torch's fused AdamW is as fast.
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1, "torch_adam": True, "fused": CUDA}},
    } | job.get("sections", {})


def make_model(job: dict[str, Any]) -> Any:
    if "llama" not in job:
        from gpt_model import GPT

        with torch.device(DEVICE):
            model = GPT(job["depth"], job["width"], job["vocabulary"], job["context"]).bfloat16()
        model.recompute = job.get("recompute", False)
        return model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**job["llama"], max_position_embeddings=job["context"], use_cache=False)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).bfloat16().train()
    if "lora" in job:
        adapt(model, job["lora"])
    if job.get("peer") == "torchao":
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(model, module_filter_fn=lambda module, name: name != "lm_head")
    elif job.get("peer") == "accelerate":
        from accelerate import Accelerator
        from accelerate.utils.transformer_engine import convert_model

        Accelerator()  # convert_model asks for the state that this leaves behind (accelerate 1.15)
        with torch.no_grad():
            convert_model(model)
        model.to(DEVICE, torch.bfloat16)
    return model


class Adapted(torch.nn.Module):
    """A frozen Linear and its adapter of low rank, under PEFT's names: y = base(x) + B(A(x))."""

    def __init__(self, base: torch.nn.Linear, rank: int):
        super().__init__()
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.base_layer = base.requires_grad_(False)
        self.lora_A = torch.nn.Linear(base.in_features, rank, **like)
        self.lora_B = torch.nn.Linear(rank, base.out_features, **like)
        torch.nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapt(model: Any, rank: int) -> None:
    """Freeze the model; adapters for the Linears of its decoder layers."""
    model.requires_grad_(False)
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and not isinstance(module, Adapted):
                setattr(module, name, Adapted(child, rank))


def compile_model(engine: Any, job: dict[str, Any]) -> None:
    if job.get("compiled") == "engine":
        engine.compile()
    elif job.get("compiled") == "blocks":
        for layer in engine.module.model.layers if "llama" in job else engine.module.blocks:
            layer.compile()


def loss_of(engine: Any, tokens: torch.Tensor, job: dict[str, Any]) -> torch.Tensor:
    if "llama" not in job:
        return engine(tokens)
    if job.get("peer") != "accelerate":
        return engine(input_ids=tokens, labels=tokens).loss
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    with te.fp8_autocast(enabled=True, fp8_recipe=DelayedScaling()):  # as Accelerate's prepared forward does
        return engine(input_ids=tokens, labels=tokens).loss


def run(job: dict[str, Any]) -> dict[str, Any]:
    start_one_rank()
    if CUDA:
        torch.cuda.set_device(DEVICE)
    if not job.get("plugin", True):
        os.environ["DS_FP8_DISABLE"] = "1"
    import deepspeed

    if job.get("plugin", True):
        import ds_fp8

        ds_fp8.activate()
    if not CUDA:  # only inference uses it, and its build takes most of a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if CUDA else "gloo")
    torch.manual_seed(0)
    model = make_model(job)
    numel = sum(parameter.numel() for parameter in model.parameters())
    engine = deepspeed.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=config_of(job)
    )[0]
    compile_model(engine, job)
    at_rest = torch.cuda.memory_allocated() if CUDA else 0
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator(DEVICE).manual_seed(1 + rank)
    shape = (job["micro_batch"], job["context"])
    vocabulary = job["llama"]["vocab_size"] if "llama" in job else job["vocabulary"]
    step_times, optimizer_times, losses = [], [], []

    def one_step() -> tuple[float, float, float]:
        """(begin, before the optimizer's step, end) on the host's clock; the last loss goes to `losses`."""
        wait()
        begin = time.perf_counter()
        for _ in range(job["gas"]):
            loss = loss_of(engine, torch.randint(0, vocabulary, shape, device=DEVICE, generator=generator), job)
            engine.backward(loss)
            if engine.is_gradient_accumulation_boundary() and job.get("steps_timed_apart"):
                wait()
            before_step = time.perf_counter()
            engine.step()
        wait()
        losses.append(round(float(loss.detach()), 4))
        return begin, before_step, time.perf_counter()

    for number in range(job["steps"]):
        begin, before_step, now = one_step()
        if number >= min(3, job["steps"] - 1):
            step_times.append(now - begin)
            optimizer_times.append(now - before_step)
    if "profile" in job:
        profile(one_step, job["profile"])
        for _ in range(job["gas"]):
            engine.backward(
                loss_of(engine, torch.randint(0, vocabulary, shape, device=DEVICE, generator=generator), job)
            )
            if not engine.is_gradient_accumulation_boundary():
                engine.step()
        wait()
        profile(engine.step, job["profile"] + ".step")
    seconds = statistics.median(step_times)
    result = {"parameters": numel, "ms per step": round(seconds * 1e3, 2), "losses": losses[-3:]}
    result |= {"tokens per s": round(world_size * job["micro_batch"] * job["gas"] * job["context"] / seconds)}
    result |= {
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 2) if CUDA else 0,
        "at rest GB": round(at_rest / 1e9, 2),
    }
    if job.get("steps_timed_apart"):
        result["optimizer step ms"] = round(statistics.median(optimizer_times) * 1e3, 2)
    return result


def profile(work: Callable[[], Any], path: str) -> None:
    """Write what one call of `work` does, by device time and by host time."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * CUDA
    with torch.profiler.profile(activities=kinds) as found:
        work()
    averages = found.key_averages()
    orders = ["self_cuda_time_total"] * CUDA + ["self_cpu_time_total"]
    Path(path).write_text(
        "\n".join(averages.table(sort_by=order, row_limit=40, max_name_column_width=90) for order in orders)
    )


if __name__ == "__main__":
    try:
        found = run(json.loads(sys.argv[1]))
    except torch.OutOfMemoryError as error:
        found = {"out of memory": str(error).splitlines()[0][:160]}
    if os.environ.get("RANK", "0") == "0":
        print("RESULT " + json.dumps(found), flush=True)
