"""The algorithms whose states `msamp` keeps, as far as it can be known without torch: their names and their states.

An algorithm is two things: an entry here, which is what the JSON, the plan and the cost of memory know of it, and a
class in `ds_fp8/optim` (`ALGORITHMS` there), which steps. Every other optimizer is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Every state that some algorithm keeps, in the order of checkpoints."""


@dataclass(frozen=True)
class Algorithm:
    """label  as people write it; moments  the states it keeps."""

    label: str
    moments: tuple[str, ...] = MOMENTS


ALGORITHMS = {
    "adam": Algorithm("Adam"),
    "adamw": Algorithm("AdamW"),
    "lion": Algorithm("Lion", ("exp_avg",)),
}
"""By DeepSpeed's `optimizer/type`, in small letters."""


REFUSED_OPTIONS = {
    "amsgrad": "it keeps a third state, the running maximum of exp_avg_sq",
    "maximize": "negate the loss instead",
    "capturable": "step and learning rate are read on the host",
    "differentiable": "states are updated in place, without a graph",
}
"""Options of torch's optimizers that ours cannot do, and why; in the JSON, in parameter groups and in checkpoints."""


def moments_of(optimizer_type: str | None) -> tuple[str, ...]:
    """The states of a DeepSpeed optimizer type; all of them where a client brings an optimizer that is not known
    yet.
    """
    known = ALGORITHMS.get((optimizer_type or "").lower())
    return MOMENTS if known is None else known.moments


def labels() -> str:
    """`Adam, AdamW and Lion`."""
    *first, last = [algorithm.label for algorithm in ALGORITHMS.values()]
    return f"{', '.join(first)} and {last}"
