"""What our hooks cost a step in which they have nothing to do: no plugin, plugin without sections, sections disabled.

Three engines live in one process and take their steps in turn, in an order that rotates, so that clocks, heat and a
noisy host hit all alike: runs in processes of their own differed by 10 % from one to the next. The GPT is small, so
that the host is the bottleneck and an overhead shows. The first steps run with deterministic attention and
deterministic algorithms: there the losses must be equal to the bit (attention's default backward on a GPU adds in any
order).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from gpt_job import CUDA, DEVICE, config_of, start_one_rank, wait
from gpt_model import GPT
from ledger import Ledger, main
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_fp8 import import_hook

JOB: dict[str, Any] = {"depth": 8, "width": 1024, "vocabulary": 32768, "context": 1024, "micro_batch": 4}
JOB |= {"gas": 1, "stage": 2}
if not CUDA:
    JOB |= {"depth": 2, "width": 128, "vocabulary": 512, "context": 64, "micro_batch": 2}
DISABLED = {"fp8": {"enabled": False}, "msamp": {"enabled": False}}
CASES: dict[str, dict[str, Any]] = {"no plugin": {}, "no sections": {}, "disabled": {"sections": DISABLED}}
EQUAL_STEPS = 20 if CUDA else 3


class Contestant:
    """One engine with the same start and the same tokens as the others."""

    def __init__(self, case: dict[str, Any]):
        import deepspeed

        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = GPT(JOB["depth"], JOB["width"], JOB["vocabulary"], JOB["context"]).bfloat16()
        config = config_of(JOB | case)
        self.engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        self.generator = torch.Generator(DEVICE).manual_seed(1)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self) -> None:
        shape = (JOB["micro_batch"], JOB["context"])
        tokens = torch.randint(0, JOB["vocabulary"], shape, device=DEVICE, generator=self.generator)
        wait()
        begin = time.perf_counter()
        loss = self.engine(tokens)
        self.engine.backward(loss)
        self.engine.step()
        wait()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(float(loss.detach()))


def contestants() -> dict[str, Contestant]:
    start_one_rank()
    import ds_fp8

    import_hook.remove()  # an installed ds_fp8 waits for this import
    import deepspeed

    if not CUDA:  # only inference uses it, and its build takes most of a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if CUDA else "gloo")
    found = {"no plugin": Contestant(CASES["no plugin"])}
    assert not ds_fp8.is_active(), "the first engine must be DeepSpeed's own"
    ds_fp8.activate()
    return found | {name: Contestant(case) for name, case in CASES.items() if name != "no plugin"}


def calls_of_a_step(one: Contestant) -> int:
    """Functions called in a step, Python's and C's: a hook of ours would be one more, whatever the clock says."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        one.step()
    finally:
        sys.setprofile(None)
    return count


def body(ledger: Ledger) -> None:
    engines = contestants()
    torch.use_deterministic_algorithms(True)
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(EQUAL_STEPS):
            for one in engines.values():
                one.step()
    torch.use_deterministic_algorithms(False)
    base = engines["no plugin"]
    equal = {name: one.losses == base.losses for name, one in engines.items()}
    ledger.record("losses bit-equal", equal | {"steps": EQUAL_STEPS, "last": base.losses[-1]})

    # The second look: the first fills caches.
    calls = {name: [calls_of_a_step(one) for _ in range(2)][1] for name, one in engines.items()}
    ledger.record("function calls in a step, host thread", calls)
    names = list(engines)
    for one in engines.values():
        one.step()
        one.seconds.clear()
    rounds = 0
    while ledger.left() > 20 and rounds < (240 if CUDA else 12):
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            engines[name].step()
        rounds += 1
    if not rounds:
        ledger.problem("steps", "no time left after the look at the losses")
        return
    rows = []
    for name, one in engines.items():
        # Rounds in pairs with the unmodified engine: what disturbs a round disturbs both.
        over = [mine / baseline - 1 for mine, baseline in zip(one.seconds, base.seconds, strict=True)]
        rows.append(
            {
                "case": name,
                "rounds": rounds,
                "ms per step, median": round(statistics.median(one.seconds) * 1e3, 3),
                "least": round(min(one.seconds) * 1e3, 3),
                "over no plugin, median of pairs": f"{statistics.median(over):+.2%}",
                "quartiles of pairs": ", ".join(f"{q:+.2%}" for q in statistics.quantiles(over, n=4)[::2]),
            }
        )
    ledger.record("steps", rows)


if __name__ == "__main__":
    main("hooks", body, needs_cuda=False)
