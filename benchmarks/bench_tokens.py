"""How many tokens per second does the example train on a CPU: DeepSpeed in fp32 and bf16, and with FP8 from the JSON?

    python benchmarks/bench_tokens.py [--steps 5] [--repeats 7] [--width 256 --depth 4]

The model, text and JSON of `examples/`, ZeRO-2, two ranks of one thread each. All engines live in the same two
processes and train a few steps in turn, so that a slow second hits all; a step's forward, backward and `engine.step`
are told apart. Goal: O3 with FP8 products not slower than fp32 DeepSpeed; beside bf16, whose products the emulation
uses, it shows what the casts cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from harness import Report, Timing
from wire_ranks import ROOT, run_ranks

sys.path.insert(0, str(ROOT / "examples"))

RANKS, CONTEXT = 2, 128
LOSS_GAP = 0.2
"""A broken case is off by whole units after the first ten steps."""
FP8 = {"enabled": True, "recipe": "delayed", "fp8_format": "HYBRID"}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {"bf16": {"enabled": False}},
    "bf16": {},
    "bf16 + fp8": {"fp8": FP8},
    "O2 + fp8": {"fp8": FP8, "msamp": {"enabled": True, "opt_level": "O2"}},
    "O3 + fp8": {"fp8": FP8, "msamp": {"enabled": True, "opt_level": "O3"}},
}
"""What each case changes in `examples/ds_bf16.json`."""
PHASES = ("forward", "backward", "step")
CPU = "CPU time of a rank"


def make_engine(case: str, width: int, depth: int, micro_batch: int) -> Any:
    import deepspeed
    from gpt import GPT

    config = json.loads((ROOT / "examples" / "ds_bf16.json").read_text()) | CASES[case]
    config["train_micro_batch_size_per_gpu"] = micro_batch
    torch.manual_seed(1)
    model = GPT(width=width, depth=depth)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def burst(engine: Any, text: Any, rank: int, first: int, steps: int) -> tuple[dict[str, float], float]:
    """Seconds per step of each phase on this rank, its CPU seconds per step, and the last loss."""
    spent = dict.fromkeys(PHASES, 0.0)
    torch.distributed.barrier()
    begun_s = time.process_time()
    for step in range(first, first + steps):
        tokens, targets = text.batch(step, rank, engine.train_micro_batch_size_per_gpu())
        marks = [time.perf_counter()]
        loss = engine(tokens, targets)
        marks.append(time.perf_counter())
        engine.backward(loss)
        marks.append(time.perf_counter())
        engine.step()
        marks.append(time.perf_counter())
        for phase, begun, ended in zip(PHASES, marks, marks[1:], strict=False):
            spent[phase] += (ended - begun) / steps
    spent[CPU] = (time.process_time() - begun_s) / steps
    return spent, loss.item()


def train(rank: int, world_size: int, steps: int, repeats: int, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """All cases in turn, `repeats` bursts of each after one to warm up."""
    import ds_fp8

    ds_fp8.activate()
    from gpt import Text

    engines = {case: make_engine(case, *sizes) for case in CASES}
    text = Text(CONTEXT, seed=1)
    rounds: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    losses = {}
    for repeat in range(repeats + 1):
        for case, engine in engines.items():
            spent, losses[case] = burst(engine, text, rank, repeat * steps, steps)
            if repeat:
                rounds[case].append(spent)
    return {"rounds": rounds, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of one burst")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in each rank
    sizes = (options.width, options.depth, options.micro_batch)
    found = run_ranks(RANKS, train, options.steps, options.repeats, sizes)[0]
    # Correct before fast: all of them train, and FP8 stays beside bf16.
    losses = found["losses"]
    assert all(abs(loss - losses["bf16"]) < LOSS_GAP for loss in losses.values()), losses
    report = Report("tokens", "How many tokens per second does the example train on a CPU?")
    tokens = RANKS * options.micro_batch * CONTEXT
    steps: dict[str, Timing] = {}
    for case, rounds in found["rounds"].items():
        steps[case] = Timing.of([sum(spent[phase] for phase in PHASES) for spent in rounds])
        report.timing(case, "tokens per second", steps[case], value=tokens / steps[case].median_s, unit="tokens/s")
    for phase in (*PHASES, CPU):
        for case, rounds in found["rounds"].items():
            timing = Timing.of([spent[phase] for spent in rounds])
            report.timing(case, phase, timing, value=timing.median_s * 1e3, unit="ms")
    peer = ", ".join(f"{name} {tokens / steps[name].median_s:.0f} tokens/s" for name in ("fp32", "bf16"))
    more = {phase: median_ms(found, "O3 + fp8", phase) - median_ms(found, "bf16", phase) for phase in (*PHASES, CPU)}
    apart = "O3 + fp8 against bf16, ms a step more: " + ", ".join(f"{phase} {ms:+.1f}" for phase, ms in more.items())
    result = steps["fp32"].median_s / steps["O3 + fp8"].median_s
    report.goal("O3 + fp8 against fp32 DeepSpeed, tokens/s", result=result, goal=1.0, reason=apart, peer=peer)
    report.note(f"{apart}. The products are bf16's; the casts and decodes of the emulation come on top")
    report.note("last losses: " + ", ".join(f"{case} {loss:.4f}" for case, loss in losses.items()))
    report.write()


def median_ms(found: dict[str, Any], case: str, phase: str) -> float:
    return 1e3 * statistics.median(spent[phase] for spent in found["rounds"][case])


if __name__ == "__main__":
    main()
