"""Does a mixture's loss curve lie on the bf16 curve? A small Mixtral on the example's text, experts in FP8.

    nice python benchmarks/bench_moe.py --seeds 1 2 3 --steps 80 --out runs/moe

One process, DeepSpeed at ZeRO 1, transformers' own classes: 8 experts, each token visits 2. Cases differ in their JSON
alone, a finished run is not repeated. The gap is that of the mean training loss of the last steps and of the eval loss
to bf16 with the same seed, beside what bf16 itself does over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from gpt import Text
from harness import RESULTS, cpu_name, hardware_slug, versions

CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8 current": {"fp8": {"enabled": True, "recipe": "current"}},
    "fp8 block": {"fp8": {"enabled": True, "recipe": "block", "fp8_format": "E4M3"}},
}
CONTEXT, BATCH, LAST = 64, 8, 20
SIZES = {
    "vocab_size": 256, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip


def run(case: str, seed: int, steps: int) -> dict[str, Any]:
    """Training losses and the eval loss of one run."""
    import deepspeed
    import transformers

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for 40 s; only inference uses it
    torch.manual_seed(seed)
    text = Text(CONTEXT, seed)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES))
    settings = {
        "train_micro_batch_size_per_gpu": BATCH, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
        "gradient_clipping": 1.0, "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config={**settings, **CASES[case]}
    )
    losses = []
    for step in range(steps):
        inputs, targets = text.batch(step, 0, BATCH)
        logits = engine(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        held_out = [
            torch.nn.functional.cross_entropy(engine(input_ids=a).logits.float().flatten(0, 1), b.flatten()).item()
            for a, b in text.evaluation(0, 1, 64, BATCH)
        ]
    return {"train": losses, "eval_loss": statistics.mean(held_out)}


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        f"| case | eval loss by seed | mean gap | training loss of the last {LAST}, mean gap |",
        "|---|---|---|---|",
    ]
    for case, runs in found.items():
        pairs = list(zip(runs, found["bf16"], strict=False))
        gap = statistics.mean(ours["eval_loss"] - baseline["eval_loss"] for ours, baseline in pairs)
        late = statistics.mean(
            statistics.mean(ours["train"][-LAST:]) - statistics.mean(baseline["train"][-LAST:])
            for ours, baseline in pairs
        )
        shown = ", ".join(f"{one['eval_loss']:.4f}" for one in runs)
        gaps = ("-", "-") if case == "bf16" else (f"{gap:+.4f}", f"{late:+.4f}")
        lines.append(f"| {case} | {shown} | {' | '.join(gaps)} |")
    spread = statistics.stdev(one["eval_loss"] for one in found["bf16"]) if len(found["bf16"]) > 1 else 0.0
    return [*lines, "", f"bf16 itself spreads by {spread:.4f} (standard deviation) over its seeds."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "moe")
    options = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29871")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for case in CASES:
            file = options.out / f"{case.replace(' ', '-')}_{seed}_{options.steps}.json"
            if not file.exists():
                file.write_text(json.dumps(run(case, seed, options.steps)))
            found.setdefault(case, []).append(json.loads(file.read_text()))
            row = {"bench": "moe", "case": case, "seed": seed, "eval_loss": found[case][-1]["eval_loss"]}
            print(json.dumps(row), flush=True)
    now = datetime.now(timezone.utc)
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    sizes = ", ".join(f"{key} {value}" for key, value in SIZES.items())
    lines = [f"# {__doc__.splitlines()[0]}", "", f"{now:%Y-%m-%d}, {cpu_name()}, {os.cpu_count()} cores, one process  "]
    lines += [
        f"{software}  ",
        f"`python benchmarks/bench_moe.py {' '.join(sys.argv[1:])}`  ",
        f"{sizes}",
        "",
        *table(found),
    ]
    target = RESULTS / f"moe_{hardware_slug()}_{now:%Y%m}.md"
    target.write_text("\n".join(lines) + "\n")
    print(f"written: {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
