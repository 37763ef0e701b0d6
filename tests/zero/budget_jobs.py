"""What a step of ZeRO 3 costs the host: operators that launch kernels, and calls of Python, by what they serve."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import prefetch_jobs
from torch.utils._python_dispatch import TorchDispatchMode

NO_LAUNCH = ("empty", "detach", "alias", "_to_copy_view", "set_")
"""Operators that give memory or another view of it."""


class Parts(TorchDispatchMode):
    """Counts by part: (part, kind) -> number.

    launches  of torch's operators, and of this package's own kernels; what is one kernel on a GPU counts as one
    calls     of Python functions, `ours` of those in this package
    times     how often the part was entered
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.within = ["other"]
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.kernels and not func.is_view and not any(word in name for word in NO_LAUNCH):
            self.counts[self.within[-1], "launches"] += 1
        return func(*args, **(kwargs or {}))

    def profile(self, frame: Any, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        public = not frame.f_code.co_name.startswith(("_", "<")) and frame.f_code.co_name != "library_for"
        if public and file.endswith("ds_fp8/kernels/messages.py"):
            self.counts[self.within[-1], "launches"] += event == "call"
            self.kernels += (event == "call") - (event == "return")
        if event != "call":
            return
        self.counts[self.within[-1], "calls"] += 1
        if "/ds_fp8/" in file:
            self.counts[self.within[-1], "ours"] += 1
            if public and file.endswith("kernels/dispatch.py") and not self.kernels:
                self.counts[self.within[-1], "launches"] += 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.within.append(name)
        self.counts[name, "times"] += 1
        try:
            yield
        finally:
            self.within.pop()

    def around(self, holder: Any, method: str, name: str) -> Callable[[], None]:
        """Count what `holder.method` does as the part `name`; returns what undoes it."""
        original = getattr(holder, method)
        own = method in vars(holder)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(holder, method, counted)
        return lambda: setattr(holder, method, original) if own else delattr(holder, method)


def step_by_parts(rank: int, **sections: Any) -> dict[tuple[str, str], int]:
    """A step that follows ZeRO 3's trace."""
    from ds_fp8.zero import chunks_stage3

    engine = prefetch_jobs.start(2, frozen=False, **sections)
    for _ in range(4):
        prefetch_jobs.step(engine, rank)
    parts = Parts()
    undo = [
        parts.around(chunks_stage3.Message, "begin", "gather"),
        parts.around(chunks_stage3.QuantizedHandle, "wait", "arrival"),
        parts.around(engine, "forward", "forward"),
        parts.around(engine, "backward", "backward"),
        parts.around(engine, "step", "step"),
    ]
    if hasattr(engine.optimizer, "_fp8_scatter"):
        undo.append(parts.around(engine.optimizer, "_fp8_scatter", "reduction"))
    with parts:
        sys.setprofile(parts.profile)
        prefetch_jobs.step(engine, rank)
        sys.setprofile(None)
    for one in undo:
        one()
    engine.destroy()
    return dict(parts.counts)


def everything(rank: int, world_size: int) -> dict[str, dict[tuple[str, str], int]]:
    import ds_fp8

    ds_fp8.activate()
    levels = {level: {"msamp": {"enabled": True, "opt_level": level}} for level in ("O2", "O3")}
    return {
        "bf16": step_by_parts(rank),
        "fp8": step_by_parts(rank, fp8=prefetch_jobs.FP8),
        "O2": step_by_parts(rank, fp8=prefetch_jobs.FP8, **levels["O2"]),
        "O3": step_by_parts(rank, fp8=prefetch_jobs.FP8, **levels["O3"]),
    }
