"""Which layers are slower in FP8 than in bf16 on this GPU, and which backend is faster, by measurements.

A small linear layer takes as long as the host needs to start its kernels, and FP8 starts more of them. The figures are
of one layer alone, forward and backward, so the host's time counts in full. In a deep model the host runs ahead of the
device, and FP8 wins for layers where it loses alone (GPT of width 2048, 16K tokens: 1.2x). So the figures choose a
backend and name layers that may lose. `min_features` stays 0, because no width was seen to lose in a model.
Source: benchmarks/results/gpu_h200_202611.md, measurement `linear` of 2026-11-24 (torch 2.11, Transformer Engine
2.20.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..capabilities import Host
from .decisions import ModuleDecision

DEVICE, CAPABILITY = "H200", (9, 0)
SOURCE = "benchmarks/results/gpu_h200_202611.md"
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

SHOWN = 3


def measured(host: Host) -> bool:
    """Whether the figures are this GPU's: the H100 is the same processor with slower memory."""
    return host.device_type == "cuda" and host.compute_capability == CAPABILITY


def faster_backend(host: Host, recipe: str) -> str | None:
    """The backend that was at least as fast in every case; None where nothing was measured, or each wins some."""
    if not measured(host) or ("torch", recipe) not in SPEED:
        return None
    pairs = [
        (ours, theirs)
        for width, row in SPEED["torch", recipe].items()
        for ours, theirs in zip(row, SPEED["transformer_engine", recipe][width], strict=True)
    ]
    if all(ours >= theirs for ours, theirs in pairs):
        return "torch"
    return "transformer_engine" if all(theirs >= ours for ours, theirs in pairs) else None


def wins_from(backend: str, recipe: str, features: int) -> int | None:
    """Tokens from which a layer whose smaller side is `features` was faster alone; None: at none of TOKENS.

    Between two measured widths the narrower one counts.
    """
    rows = SPEED[backend, recipe]
    width = max((width for width in rows if width <= features), default=min(rows))
    return next((tokens for tokens, speed in zip(TOKENS, rows[width], strict=True) if speed >= 1), None)


def slower_note(host: Host, backend: str, recipe: str, modules: Sequence[ModuleDecision]) -> str | None:
    """One line about the layers that are likely slower in FP8, by the number of tokens; None if nothing is known."""
    layers = [module for module in modules if module.is_swap and module.kind == "Linear" and len(module.shape) == 2]
    if not layers or not measured(host) or (backend, recipe) not in SPEED:
        return None
    groups: dict[int | None, list[str]] = {}
    for layer in layers:
        groups.setdefault(wins_from(backend, recipe, min(layer.shape)), []).append(layer.fqn or "the model itself")
    parts = [
        f"{len(groups[tokens])} of {len(layers)} below {tokens} tokens per micro-batch"
        for tokens in TOKENS
        if tokens in groups and tokens > TOKENS[0]
    ]
    if None in groups:
        names = groups[None]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        parts.append(f"{len(names)} of {len(layers)} up to {TOKENS[-1]} ({', '.join(names[:SHOWN])}{more})")
    if not parts:
        return None
    return (
        f"likely slower in FP8 than in bf16 where the host sets the pace (one layer alone on an {DEVICE}): "
        f"{', '.join(parts)}; fp8/layers/min_features keeps narrow ones in bf16 ({SOURCE})"
    )
