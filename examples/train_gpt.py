"""Train a small GPT with DeepSpeed: an unmodified script, started by any launcher, steered by the JSON alone.

    deepspeed --num_accelerators 2 examples/train_gpt.py --deepspeed_config examples/ds_bf16.json --out runs/bf16

Writes `metrics.json` (losses, throughput) and checkpoints into --out, and goes on from the newest checkpoint there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from gpt import GPT, Text
from tqdm import tqdm


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder of metrics.json and checkpoints")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps in all, resumed ones included")
    parser.add_argument("--eval-every", type=int, default=25, help="steps between two evaluations")
    parser.add_argument("--save-every", type=int, default=0, help="steps between two checkpoints; 0: none")
    parser.add_argument("--eval-windows", type=int, default=64, help="held-out windows, over all ranks")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the deepspeed launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def skip_shared_memory_build() -> None:
    """On a CPU, DeepSpeed compiles a collective that only inference uses, for 40 s and only where a compiler is."""
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, text: Text, windows: int) -> float:
    """Mean loss over the held-out windows of all ranks."""
    engine.eval()
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    total = torch.zeros(2, device=engine.device)
    for tokens, targets in text.evaluation(rank, world_size, windows, size=engine.train_micro_batch_size_per_gpu()):
        loss = engine(tokens.to(engine.device), targets.to(engine.device))
        total += torch.tensor([loss.item() * len(tokens), len(tokens)], device=engine.device)
    deepspeed.comm.all_reduce(total)
    engine.train()
    return (total[0] / total[1]).item()


def train_step(engine: deepspeed.DeepSpeedEngine, text: Text, step: int) -> float:
    """One optimizer step over all micro-batches; this rank's mean loss."""
    rank, losses = deepspeed.comm.get_rank(), []
    accumulation = engine.gradient_accumulation_steps()
    for micro_step in range(accumulation):
        tokens, targets = text.batch(step * accumulation + micro_step, rank, engine.train_micro_batch_size_per_gpu())
        loss = engine(tokens.to(engine.device), targets.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def main() -> None:
    args = arguments()
    skip_shared_memory_build()
    torch.manual_seed(args.seed)
    model = GPT(context=args.context, width=args.width, depth=args.depth)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
    text = Text(args.context, args.seed)
    is_first = deepspeed.comm.get_rank() == 0
    curve: dict[str, list] = {"train": [], "eval": []}

    if (args.out / "latest").exists():
        _, kept = engine.load_checkpoint(str(args.out))
        curve = kept["curve"]
    start = engine.global_steps

    spent_s = 0.0
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=not is_first, unit="step")
    for step in bar:
        begin = time.perf_counter()
        loss = train_step(engine, text, step)
        spent_s += time.perf_counter() - begin
        curve["train"].append([step + 1, loss])
        done = step + 1
        if done % args.eval_every == 0 or done == args.steps:
            curve["eval"].append([done, evaluate(engine, text, args.eval_windows)])
        bar.set_postfix(loss=f"{loss:.3f}", eval=f"{curve['eval'][-1][1]:.3f}" if curve["eval"] else "-")
        if args.save_every and done % args.save_every == 0:
            engine.save_checkpoint(str(args.out), client_state={"curve": curve})

    if is_first:
        taken = max(args.steps - start, 1)
        metrics = {
            "config": args.deepspeed_config,
            "parameters": parameters,
            "ranks": deepspeed.comm.get_world_size(),
            "steps": args.steps,
            "seed": args.seed,
            "eval_loss": curve["eval"][-1][1] if curve["eval"] else None,
            "steps_per_s": taken / spent_s if spent_s else None,
            "tokens_per_s": taken * engine.train_batch_size() * args.context / spent_s if spent_s else None,
            "curve": curve,
        }
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "metrics.json").write_text(json.dumps(metrics) + "\n")
        print(f"eval loss {metrics['eval_loss']:.4f}; {parameters / 1e6:.1f} M parameters; {args.out}/metrics.json")
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
