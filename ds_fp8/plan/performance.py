"""Where FP8 was measured to be faster than bf16 on this GPU, and which backend is faster: in models, and layer by
layer.

A small linear layer takes as long as the host needs to start its kernels, and FP8 starts more of them. One layer alone
pays for all of that (`SPEED`); in a deep model the host runs ahead of the device, and FP8 wins where its layers lose
alone; compiled, it has less to start, and a CUDA graph takes it out altogether. So trainings of whole models (`MODELS`)
have the first word: they choose the backend where both were measured, and the banner names only layers that are
narrower than every model that gained. `min_features` stays 0, because no width was seen to lose in a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..capabilities import Host
from .decisions import ModuleDecision

CAPABILITY = (9, 0)
SOURCE = "benchmarks/results/gpu_h200_202611.md"
"""Of SPEED: measurement `linear` of 2026-11-24, one H200 (torch 2.11, Transformer Engine 2.20.2)."""
LLAMA = "benchmarks/results/gpu_h100_llama_202611.md"
TOKENS = (1024, 4096, 16384)

SPEED = {
    ("torch", "delayed"): {
        1024: (0.58, 0.56, 0.64),
        2048: (0.57, 0.56, 0.76),
        4096: (0.57, 0.77, 1.45),
        8192: (0.84, 1.41, 1.74),
    },
    ("torch", "current"): {
        1024: (0.70, 0.68, 0.74),
        2048: (0.68, 0.69, 0.92),
        4096: (0.70, 0.92, 1.50),
        8192: (0.99, 1.54, 1.76),
    },
    ("torch", "block"): {
        1024: (0.67, 0.60, 0.67),
        2048: (0.63, 0.60, 0.81),
        4096: (0.62, 0.73, 1.19),
        8192: (0.85, 1.23, 1.37),
    },
    ("transformer_engine", "delayed"): {
        1024: (0.41, 0.35, 0.38),
        2048: (0.37, 0.37, 0.52),
        4096: (0.41, 0.48, 1.23),
        8192: (0.54, 1.12, 1.67),
    },
    ("transformer_engine", "current"): {
        1024: (0.46, 0.40, 0.46),
        2048: (0.40, 0.40, 0.58),
        4096: (0.44, 0.54, 1.35),
        8192: (0.64, 1.30, 1.70),
    },
    ("transformer_engine", "block"): {
        1024: (0.47, 0.43, 0.49),
        2048: (0.43, 0.44, 0.61),
        4096: (0.46, 0.56, 1.18),
        8192: (0.66, 1.14, 1.37),
    },
}
"""(backend, recipe) -> width -> times bf16's speed at each of TOKENS, of a square layer."""


class MeasuredModel(NamedTuple):
    """One training beside bf16 in the same run, on one GPU.

    width    of its hidden states
    tokens   of a micro-batch
    compile  None: eager against eager; "default" or "reduce-overhead": ours in that mode against bf16 compiled
    speed    times bf16's
    over_te  times that of the same job through Transformer Engine, where that was measured
    recipe   it was trained with
    """

    name: str
    width: int
    tokens: int
    compile: str | None
    speed: float
    over_te: float | None
    source: str
    recipe: str = "delayed"


MODELS = (
    MeasuredModel("GPT of 1.18B", 2048, 16384, None, 1.21, 1.03, SOURCE),
    MeasuredModel("GPT of 1.18B, O2", 2048, 16384, None, 1.31, 1.04, SOURCE),
    MeasuredModel("Llama of 8B width, O2", 4096, 8192, None, 1.43, None, LLAMA),
    MeasuredModel("Llama 1B, O2", 2048, 8192, None, 1.28, None, LLAMA),
    MeasuredModel("Llama of 8B width, O2", 4096, 8192, "default", 1.60, None, LLAMA),
    MeasuredModel("Llama 1B, O2", 2048, 8192, "default", 1.29, None, LLAMA),
    MeasuredModel("GPT of 1.18B, O2", 2048, 16384, "default", 1.42, None, LLAMA),
    MeasuredModel("two blocks of a GPT", 2048, 4096, "reduce-overhead", 1.14, None, LLAMA),
)

SHOWN = 3


def measured(host: Host) -> bool:
    """Whether the figures are this GPU's: the H100 is the same processor with slower memory."""
    return host.device_type == "cuda" and host.compute_capability == CAPABILITY


def faster_backend(host: Host, recipe: str) -> str | None:
    """The backend that was at least as fast in every case: in models where both were measured, else layer by layer.
    None where nothing was measured, or each wins some.
    """
    if not measured(host) or ("torch", recipe) not in SPEED:
        return None
    ratios = [model.over_te for model in MODELS if model.over_te is not None and model.recipe == recipe]
    if not ratios:
        theirs = SPEED["transformer_engine", recipe]
        ratios = [
            one / other
            for width, row in SPEED["torch", recipe].items()
            for one, other in zip(row, theirs[width], strict=True)
        ]
    if min(ratios) >= 1:
        return "torch"
    return "transformer_engine" if max(ratios) <= 1 else None


def wins_from(backend: str, recipe: str, features: int) -> int | None:
    """Tokens from which a layer whose smaller side is `features` was faster alone; None: at none of TOKENS.

    Between two measured widths the narrower one counts.
    """
    rows = SPEED[backend, recipe]
    width = max((width for width in rows if width <= features), default=min(rows))
    return next((tokens for tokens, speed in zip(TOKENS, rows[width], strict=True) if speed >= 1), None)


def narrowest_gain(compile: str | None) -> MeasuredModel:  # noqa: A002 (the key's name)
    """The narrowest model that was faster than bf16, run in this way: eager, or compiled in this mode."""
    mode = "reduce-overhead" if compile == "max-autotune" else "default" if compile is not None else None
    alike = [model for model in MODELS if model.speed >= 1 and model.compile == mode]
    alike = alike or [model for model in MODELS if model.speed >= 1 and (model.compile is None) == (compile is None)]
    return min(alike, key=lambda model: (model.width, -model.speed))


def slower_note(
    host: Host,
    backend: str,
    recipe: str,
    modules: Sequence[ModuleDecision],
    compile: str | None = None,  # noqa: A002 (the key's name)
) -> str | None:
    """One line about the layers that are likely slower in FP8; None where none is, or nothing is known.

    compile  mode of `fp8.compile`, None where it is off
    """
    layers = [module for module in modules if module.is_swap and module.kind == "Linear" and len(module.shape) == 2]
    if not measured(host) or (backend, recipe) not in SPEED:
        return None
    gained = narrowest_gain(compile)
    slow = [
        layer
        for layer in layers
        if max(layer.shape) < gained.width and wins_from(backend, recipe, min(layer.shape)) != TOKENS[0]
    ]
    if not slow:
        return None
    names = ", ".join(layer.fqn or "the model itself" for layer in slow[:SHOWN])
    more = f" and {len(slow) - SHOWN} more" if len(slow) > SHOWN else ""
    how = "compiled" if gained.compile else "eager"
    cure = "" if compile is not None else "fp8/compile takes most of the host's time away, "
    return (
        f"likely slower in FP8 than in bf16 where the host sets the pace: {len(slow)} of {len(layers)} Linear "
        f"({names}{more}), narrower than every model that was measured to gain (the narrowest, {how}: {gained.name}, "
        f"width {gained.width}, {gained.speed}x bf16 with {gained.tokens} tokens per micro-batch; {gained.source}); "
        f"{cure}fp8/layers/min_features keeps narrow ones in bf16"
    )
