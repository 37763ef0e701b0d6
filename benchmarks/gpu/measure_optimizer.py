"""One optimizer step of 512M parameters: ours in Triton against torch AdamW(fused), TE's FusedAdam, and the copy
bandwidth.

Counted bytes are those that a step must read and write once: gradient, states, master and parameter with their scales.
"""

from __future__ import annotations

from typing import Any

import torch
from ledger import Ledger, main
from timing import alternate, copy_bytes_per_ms, free

from ds_fp8 import kernels
from ds_fp8.kernels.adam import AdamStep
from ds_fp8.numerics import masters, states

NUMEL = 2**29


def make_step(m: str, v: str, master: str, rounding: str, grad: torch.Tensor, numel: int) -> AdamStep:
    generator = torch.Generator("cuda").manual_seed(0)
    param = (torch.randn(numel, device="cuda", generator=generator) * 0.02).bfloat16()
    return AdamStep(
        param=param, grad=grad, exp_avg=states.new_state(m, numel, "cuda"),
        exp_avg_sq=states.new_state(v, numel, "cuda"), master=masters.new_master(master, param),
        lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
        decoupled=True, step=1, grad_scale=torch.ones((), device="cuda"), rounding=rounding,
    )  # fmt: skip


def moved_bytes(step: AdamStep) -> int:
    """States and master are read and written, the gradient only read."""
    held = [
        *step.exp_avg.tensors().values(),
        *step.exp_avg_sq.tensors().values(),
        *step.master.tensors().values(),
    ]
    # A weight that is part of its master is read too, any other only written.
    passes = 2 if step.master.format.startswith("split") else 1
    return 2 * sum(tensor.nbytes for tensor in held) + passes * step.param.nbytes + step.grad.nbytes


def run(ledger: Ledger, numel: int) -> None:
    ceiling = copy_bytes_per_ms()
    ledger.record("copy TB/s", round(ceiling / 1e9, 3))
    free()
    grad32 = torch.randn(numel, device="cuda") * 1e-3
    weight = torch.nn.Parameter(torch.randn(numel, device="cuda") * 0.02)
    weight.grad = grad32
    optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.1, fused=True)
    fused = alternate({"torch": optimizer.step})["torch"]["ms"]
    ledger.record("torch AdamW(fused) fp32, ms", fused)
    del optimizer, weight
    grad = grad32.bfloat16()
    del grad32
    free()

    rows: list[dict[str, Any]] = []
    cases = [("int8", "fp16", "split24", "nearest"), ("int8", "fp16", "split24", "stochastic"),
             ("e4m3", "fp16", "split24", "nearest"), ("int8", "fp16", "fp16", "nearest"),
             ("int8", "fp16", "fp16", "stochastic"),
             ("int8", "e4m3", "split24", "nearest"), ("fp32", "fp32", "split32", "nearest"),
             ("e4m3_expanded", "e4m3_expanded", "split24", "nearest")]  # fmt: skip
    for m, v, master, rounding in cases:
        step = make_step(m, v, master, rounding, grad, numel)
        found = alternate({"ours": lambda step=step: kernels.adam_step(step)})["ours"]
        count = moved_bytes(step)
        row = {
            "exp_avg": m,
            "exp_avg_sq": v,
            "master": master,
            "rounding": rounding,
            "ms": found["ms"],
        }
        row |= {"x torch fused": round(fused / found["ms"], 2), "bytes per parameter": round(count / numel, 2)}
        row |= {"of copy bandwidth": round(count / found["ms"] / ceiling, 3), "spread": found["spread"]}
        rows.append(row)
        ledger.record("one step", rows)
        del step
        free()


def te_fused_adam(ledger: Ledger, numel: int) -> dict[str, Any]:
    """Transformer Engine's FusedAdam with the states of O2: time and temporaries."""
    import transformer_engine.pytorch as te

    weight = torch.nn.Parameter((torch.randn(numel, device="cuda") * 0.02).bfloat16())
    weight.grad = (torch.randn(numel, device="cuda") * 1e-3).bfloat16()
    optimizer = te.optimizers.FusedAdam(
        [weight], lr=1e-4, weight_decay=0.1, master_weights=True, master_weight_dtype=torch.float16,
        exp_avg_dtype=torch.uint8, exp_avg_sq_dtype=torch.float16,
    )  # fmt: skip
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = alternate({"te": optimizer.step}, repeats=5)["te"]
    temporaries = (torch.cuda.max_memory_allocated() - before) / numel
    return found | {"temporaries, bytes per parameter": round(temporaries, 2)}


def body(ledger: Ledger) -> None:
    ledger.record("path", kernels.path("cuda"))
    ledger.attempt("ours", lambda: run(ledger, NUMEL))
    free()
    ledger.attempt("TE FusedAdam, fp8 m, fp16 v, fp16 master", lambda: te_fused_adam(ledger, NUMEL), needs_s=30)


if __name__ == "__main__":
    main("optimizer", body)
