"""ZeRO-3 on several GPUs of one host: an HF Llama of 8B width with random weights, bf16 DeepSpeed beside ours.

Steps of one micro-batch of 4 x 2048 tokens with activation checkpointing (non-reentrant): least and median
milliseconds, spread, peak memory and memory at rest before the first step. One process per GPU runs all configurations
one after the other:

    torchrun --nproc-per-node 2 benchmarks/gpu/zero3_llama.py --layers 14 [--stage 3] [--names bf16,fp8,O2,O3]
    [--lora 16] [--deterministic] [--profile]

Prints one line of JSON for each configuration on rank 0. --lora freezes the model and trains adapters of this rank on
the Linears of its layers. --deterministic asks torch for sums in a fixed order, so that losses and the weights' digest
of two runs can be compared. --profile adds launches and host time by operator.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from gpt_job import adapt
from transformers import LlamaConfig, LlamaForCausalLM

SECTIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"fp8": {"enabled": True, "backend": "torch"}},
    "O2": {"fp8": {"enabled": True, "backend": "torch"}, "msamp": {"enabled": True, "opt_level": "O2"}},
    "O3": {"fp8": {"enabled": True, "backend": "torch"}, "msamp": {"enabled": True, "opt_level": "O3"}},
    "fp8 frozen": {"fp8": {"enabled": True, "backend": "torch", "frozen_weights": "fp8"}},
    "O3 prefetch": {  # as far ahead as before quantized values were counted by bytes
        "fp8": {"enabled": True, "backend": "torch"},
        "msamp": {"enabled": True, "opt_level": "O3"},
        "zero_optimization": {"stage3_prefetch_bucket_size": 25_000_000},
    },
    "O3 scope all": {
        "fp8": {"enabled": True, "backend": "torch"},
        "msamp": {"enabled": True, "opt_level": "O3", "gradient_wire_scope": "all"},
    },
}


def build(options: argparse.Namespace, name: str) -> Any:
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=options.layers, use_cache=False, **shape)
    torch.manual_seed(0)
    ds = {
        "train_micro_batch_size_per_gpu": options.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True, "fused": True}},
        "bf16": {"enabled": True},
        "steps_per_print": 10**9,
        **SECTIONS[name.rstrip("'")],
    }
    zero = {"stage": options.stage, "overlap_comm": True, "contiguous_gradients": True}
    ds["zero_optimization"] = zero | ds.get("zero_optimization", {})
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    if options.deterministic:
        config._attn_implementation = "eager"
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
        if options.lora:
            adapt(model, options.lora)
    torch.set_default_dtype(default)
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=ds)[0]


def digest(engine: Any) -> int:
    """Of all 16-bit weights, wherever they lie: a sum of their bits, each times its place."""
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    for parameter in engine.module.parameters():
        part = getattr(parameter, "ds_tensor", parameter).detach().view(-1).view(torch.int16)
        for start in range(0, part.numel(), 1 << 24):
            bits = part[start : start + (1 << 24)].long()
            total += (bits * (torch.arange(bits.numel(), device="cuda") % 65521 + 1)).sum()
    dist.all_reduce(total)
    return total.item()


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    engine = build(options, name)
    gc.collect()
    torch.cuda.empty_cache()
    at_rest = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    losses, taken = [], []

    def step() -> None:
        tokens = torch.randint(0, 32000, (options.batch, 2048), device="cuda", generator=generator)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())

    for number in range(options.warm + options.steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number >= options.warm:
            taken.append((time.perf_counter() - begin) * 1e3)
    found = {
        "json": name,
        "stage": options.stage,
        "ms": round(statistics.median(taken), 1),
        "least": round(min(taken), 1),
        "most": round(max(taken), 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "at_rest_gb": round(at_rest / 1e9, 2),
        "losses": [round(loss.item(), 5) for loss in losses[:6]],
    }
    if options.deterministic:
        found["digest"] = digest(engine)
    if options.profile:
        found["profile"] = profiled(step)
    engine.destroy()
    return found


def profiled(step: Any) -> dict[str, Any]:
    """Launches, and host milliseconds by operator, of one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = found.key_averages()
    kernels = sorted(
        (e for e in events if e.device_time_total and not e.cpu_time_total), key=lambda e: -e.device_time_total
    )
    host = sorted((e for e in events if e.cpu_time_total), key=lambda e: -e.self_cpu_time_total)
    launches = sum(
        e.count
        for e in events
        if e.key in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
    )
    return {
        "launches": launches,
        "kernels_ms": {e.key[:60]: [e.count, round(e.device_time_total / 1e3, 1)] for e in kernels[:12]},
        "host_ms": {e.key[:60]: [e.count, round(e.self_cpu_time_total / 1e3, 1)] for e in host[:16]},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--names", default="bf16,fp8,O2,O3")
    parser.add_argument("--plain", dest="checkpointing", action="store_false")
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--after", type=Path, help="touch the device when this file is there: imports come before")
    options = parser.parse_args()
    while options.after and not options.after.exists():
        time.sleep(0.05)
    if options.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed("nccl", verbose=False)
    base = 0.0
    for name in options.names.split(","):
        found = measure(options, name)
        base = base or found["ms"]
        if dist.get_rank() == 0:
            print(json.dumps({**found, "x first": round(base / found["ms"], 3)}), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        dist.barrier()


if __name__ == "__main__":
    import ds_fp8

    ds_fp8.activate()
    main()
