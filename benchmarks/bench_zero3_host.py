"""Host work of ZeRO-3 per layer: a narrow HF Llama of many layers, where the device's own time is next to nothing.

Steps of one micro-batch with non-reentrant checkpointing, bf16 DeepSpeed beside ours, each in processes of its own, on
the CPU (gloo) or on GPUs (NCCL, `--width 1024 --tokens 512`):

    python benchmarks/bench_zero3_host.py [--names bf16,fp8,O2,O3] [--ranks 1] [--layers 16] [--profile 40]

Prints one line of JSON each: milliseconds per layer and step (least and median of the steps; CPU time, least; what the
device took after the host was done), and calls of Python functions per layer and step, all of them and those in this
package. --profile adds the functions that cost most, by own time; --samples STEPS where the host was, by samples.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from zero3_llama import SECTIONS


def build(options: argparse.Namespace, name: str) -> Any:
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    width = options.width
    shape = {"hidden_size": width, "intermediate_size": 7 * width // 2, "num_attention_heads": max(2, width // 128)}
    shape["num_key_value_heads"] = max(2, width // 512)
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=options.layers, use_cache=False, **shape)
    torch.manual_seed(0)
    narrower = (4096 / width) ** 2  # all of DeepSpeed's defaults in proportion to a model of 8B width
    ds = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True, "fused": torch.cuda.is_available()}},
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 2 * width,
            "stage3_prefetch_bucket_size": int(5e7 / narrower),
            "reduce_bucket_size": int(5e8 / narrower),
            "stage3_max_live_parameters": int(1e9 / narrower),
            "stage3_max_reuse_distance": int(1e9 / narrower),
        },
        "steps_per_print": 10**9,
        **SECTIONS[name],
    }
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds)[0]


class Begin(torch.autograd.Function):
    """Starts a profile in the thread in which autograd runs backwards: on a GPU it is not the caller's."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, profile: cProfile.Profile) -> torch.Tensor:
        ctx.profile = profile
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        with contextlib.suppress(ValueError):  # from 3.12 on a profile is of all threads
            ctx.profile.enable()
        return grad, None


class Samples:
    """Where the host is, asked every millisecond by a thread: a profile takes as long for a call as for much work,
    this does not.
    """

    def __init__(self) -> None:
        self.own, self.within, self.count = collections.Counter(), collections.Counter(), 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Any:
        sys.setswitchinterval(1e-4)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ends.set()
        self._thread.join()
        sys.setswitchinterval(5e-3)

    def _look(self) -> None:
        me = threading.get_ident()
        while not self._ends.wait(1e-3):
            found = []
            for ident, frame in sys._current_frames().items():
                stack = []
                while frame is not None:
                    code = frame.f_code
                    stack.append(f"{'/'.join(code.co_filename.split('/')[-2:])}:{code.co_name}")
                    frame = frame.f_back
                if ident != me and not any(name.endswith((":_bootstrap", ":wait")) for name in stack[-1:]):
                    found.append(stack)
            # The caller waits in `run_backward` while autograd's own thread works.
            found = [stack for stack in found if len(found) == 1 or not stack[0].endswith("_engine_run_backward")]
            for stack in found[:1]:
                self.count += 1
                self.own[stack[0]] += 1
                self.within.update(set(stack))

    def print(self, milliseconds: float) -> None:
        """`milliseconds` of a step, shared out by samples."""
        for name, counted in (("own", self.own), ("within", self.within)):
            print(name)
            for place, number in counted.most_common(45):
                print(f"  {number / self.count * milliseconds:7.2f} ms  {place}")


def measure(options: argparse.Namespace, name: str) -> None:
    import deepspeed
    from deepspeed import comm as dist
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    torch.set_num_threads(1)
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        accelerator.communication_backend_name() if accelerator.device_name() != "cpu" else "gloo", verbose=False
    )
    if options.deepspeed_hooks:
        from ds_fp8.zero import hooks_known

        hooks_known.KNOWN = frozenset()
        hooks_known.is_known.cache_clear()
    engine = build(options, name)
    tokens = torch.randint(0, 1024, (1, options.tokens)).to(accelerator.current_device_name())
    losses, taken, waited, busy = [], [], [], []

    def step(profile: cProfile.Profile | None = None) -> None:
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss if profile is None else Begin.apply(loss, profile))
        engine.step()
        losses.append(loss.detach())

    for number in range(5 + options.steps):
        accelerator.synchronize()
        begin, worked = time.perf_counter(), time.process_time()
        step()
        submitted, worked = time.perf_counter(), time.process_time() - worked
        accelerator.synchronize()
        if number >= 5:
            taken.append((time.perf_counter() - begin) * 1e3)
            waited.append((time.perf_counter() - submitted) * 1e3)
            busy.append(worked * 1e3)
    if options.samples:
        with Samples() as samples:
            for _ in range(options.samples):
                step()
                accelerator.synchronize()
    profile, behind = cProfile.Profile(), cProfile.Profile()
    profile.enable()
    step(behind)
    profile.disable()
    stats = pstats.Stats(profile)
    if behind.getstats():
        stats.add(behind)
    own = sum(number for (file, _, _), (_, number, _, _, _) in stats.stats.items() if "/ds_fp8/" in file)
    if dist.get_rank() == 0:
        layers = options.layers
        found = {
            "json": name,
            "ranks": dist.get_world_size(),
            "ms": round(min(taken) / layers, 3),
            "median": round(statistics.median(taken) / layers, 3),
            "cpu": round(min(busy) / layers, 3),
            "waited": round(statistics.median(waited) / layers, 3),
            "calls": round(stats.total_calls / layers, 1),
            "ours": round(own / layers, 1),
            "losses": [round(loss.item(), 6) for loss in losses[:6]],
        }
        print(json.dumps(found), flush=True)
        if options.samples:
            samples.print(statistics.median(taken))
        if options.profile:
            stats.sort_stats(options.sort).print_stats(options.profile)
            if options.callers:
                stats.print_callers(options.callers)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--names", default="bf16,fp8,O2,O3")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--port", type=int, default=29742)
    parser.add_argument("--plain", dest="checkpointing", action="store_false")
    parser.add_argument("--deepspeed-hooks", action="store_true", help="without hooks_stage3")
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--samples", type=int, default=0, help="steps to sample")
    parser.add_argument("--callers", default="")
    parser.add_argument("--sort", default="tottime")
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options, options.names)
        return
    for name in options.names.split(","):
        command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--names", name]
        started = []
        for rank in range(options.ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.ranks)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port), "OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen(command, env=os.environ | place))
        if any(list(map(subprocess.Popen.wait, started))):
            raise SystemExit(f"{name} failed")


if __name__ == "__main__":
    import ds_fp8

    ds_fp8.activate()
    main()
