"""Random operations of the C++ kernels beside the PyTorch reference, byte for byte: any bit pattern, any size, odd
views.

As a script it runs in a library that was built with sanitizers:   python kernel_cases.py LIBRARY    (see
test_kernels.py)
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_fp8 import numerics
from ds_fp8.formats import E4M3, E5M2
from ds_fp8.kernels import dispatch
from ds_fp8.kernels.adam import AdamStep, reference_step
from ds_fp8.kernels.cpu import loader
from ds_fp8.kernels.self_test import _equal
from ds_fp8.numerics import flat, masters, states
from ds_fp8.numerics.random_bits import Stochastic

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(chosen: random.Random, numel: int, dtype: torch.dtype, *, finite: bool = False) -> Tensor:
    """Any bit pattern, or numbers of many binades, or one constant; not always aligned."""
    generator = torch.Generator().manual_seed(chosen.randrange(2**31))
    offset = chosen.choice((0, 0, 1, 3))
    kind = chosen.choice(("bits", "wide", "wide", "narrow", "constant"))
    n = numel + offset
    if kind == "bits" and not finite:
        x = torch.randint(-(2**31), 2**31 - 1, (n,), generator=generator, dtype=torch.int64).to(torch.int32)
        x = x.view(torch.float32)
    elif kind == "constant":
        x = torch.full((n,), chosen.choice((0.0, -0.0, 1.0, 448.0, 3e38, 1e-42, 57344.0)))
    else:
        x = torch.randn(n, generator=generator) * 10 ** chosen.uniform(-6, 4)
        if kind == "wide":
            x = x * torch.exp2(torch.randint(-20, 20, (n,), generator=generator).float())
    x = x.to(dtype)
    return (x.nan_to_num(0, 1, -1) if finite else x)[offset:]


def casts(chosen: random.Random) -> tuple[Any, ...]:
    fmt, x = chosen.choice((E4M3, E5M2)), numbers(chosen, chosen.randrange(1, 3000), chosen.choice(DTYPES))
    scale = 2 ** chosen.uniform(-20, 20)
    return dispatch.quantize, numerics.quantize, (x, scale, fmt), {}


def amax(chosen: random.Random) -> tuple[Any, ...]:
    return dispatch.amax, numerics.amax, (numbers(chosen, chosen.randrange(1, 3000), chosen.choice(DTYPES)),), {}


def tiles(chosen: random.Random) -> tuple[Any, ...]:
    name = chosen.choice(("quantize_1x128", "quantize_128x128"))
    rows, columns = chosen.randrange(1, 300), chosen.randrange(1, 300)
    x = numbers(chosen, rows * columns, chosen.choice(DTYPES[:2])).reshape(rows, columns)
    how = {"power_of_two": chosen.random() < 0.5}
    return getattr(dispatch, name), getattr(numerics, name), (x, chosen.choice((E4M3, E5M2))), how


def encode(chosen: random.Random) -> tuple[Any, ...]:
    x = numbers(chosen, chosen.randrange(1, 3000), chosen.choice(DTYPES))
    ways: list[dict[str, Any]] = [{}, {"best_of_two": True}, {"rounding": Stochastic(chosen.randrange(2**31), 3, 1)}]
    return dispatch.flat_encode, flat.encode, (x, chosen.choice((E4M3, E5M2))), chosen.choice(ways)


def sums(chosen: random.Random) -> tuple[Any, ...]:
    fmt, numel, ranks = chosen.choice((E4M3, E5M2)), chosen.randrange(1, 2000), chosen.randrange(1, 5)
    many = [flat.encode(numbers(chosen, numel, torch.float32), fmt) for _ in range(ranks)]
    quantized, scale_inv = torch.stack([one for one, _ in many]), torch.stack([one for _, one in many])
    own = numbers(chosen, numel, chosen.choice(DTYPES[:2])) if chosen.random() < 0.5 else None
    how: dict[str, Any] = {"factor": 1 / (ranks + 1), "own": own}
    if chosen.random() < 0.5:
        return dispatch.flat_sum, flat.sum_contributions, (quantized, scale_inv, fmt), how
    return (
        dispatch.flat_sum_encode,
        flat.sum_and_encode,
        (quantized, scale_inv, fmt),
        how | {"best_of_two": chosen.random() < 0.5},
    )


def steps(chosen: random.Random) -> tuple[Any, ...]:
    """Two steps of Adam in a random choice of formats, the second with a gradient that may hold anything."""
    numel, base = chosen.randrange(1, 1500), chosen.choice((torch.bfloat16, torch.float16))
    param = (numbers(chosen, numel, torch.float32, finite=True).clamp(-4, 4) * 0.01).to(base)
    state = chosen.choice(("fp32", "bf16", "fp16", "e4m3", "e4m3_expanded", "int8"))
    root = chosen.choice(("fp32", "bf16", "fp16", "e4m3", "e4m3_expanded"))
    master = chosen.choice(("fp32", "split32", "split24", "fp16"))
    step = AdamStep(
        param=param.clone(), grad=(numbers(chosen, numel, torch.float32, finite=True).clamp(-8, 8) * 1e-3).to(base),
        exp_avg=states.new_state(state, numel, "cpu"), exp_avg_sq=states.new_state(root, numel, "cpu"),
        master=masters.new_master(master, param.clone()), lr=10 ** chosen.uniform(-6, -1), beta1=0.9,
        beta2=chosen.choice((0.95, 0.999)), eps=1e-8, weight_decay=chosen.choice((0.0, 0.1)),
        decoupled=chosen.random() < 0.5, step=1, grad_scale=chosen.choice((1.0, 0.37)), seed=chosen.randrange(2**31),
        rounding=chosen.choice(("nearest", "stochastic")),
    )  # fmt: skip
    counterpart = copy.deepcopy(step)
    second = numbers(chosen, numel, base)

    def run(one: AdamStep, function: Callable[[AdamStep], None]) -> tuple[Tensor, ...]:
        for number, grad in ((1, one.grad), (2, second)):
            one.step, one.grad = number, grad
            function(one)
        return tuple(tensor for tensor in one.tensors() if tensor is not second)

    return (lambda: run(counterpart, dispatch.adam_step)), (lambda: run(step, reference_step)), (), {}


OPERATIONS = (casts, amax, tiles, encode, sums, steps, steps)


def check(seed: int) -> None:
    """One random operation; AssertionError with the seed where the kernel's bytes are not the reference's."""
    chosen = random.Random(seed)
    operation = chosen.choice(OPERATIONS)
    fast, reference, arguments, how = operation(chosen)
    with torch.no_grad():
        found, wanted = fast(*arguments, **how), reference(*arguments, **how)
    found, wanted = (one if isinstance(one, tuple) else (one,) for one in (found, wanted))
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert _equal(one, other), f"seed {seed}: {operation.__name__}, output {number} differs from the reference"


def use(library: str) -> None:
    """Let this process run the kernels of `library`."""
    loader._loaded = loader._open(library)
    loader._tried = True
    assert loader.choose("portable", loader._loaded) == "portable"


if __name__ == "__main__":
    from budget import seeds

    use(sys.argv[1])
    for each in seeds(float(sys.argv[2])):
        check(each)
