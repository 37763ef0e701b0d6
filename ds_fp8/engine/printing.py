"""One place of output: rank 0, on stdout beside DeepSpeed's own log."""

from __future__ import annotations

import sys


def print_rank_0(text: str) -> None:
    """Print `text` on rank 0, each line marked as ours."""
    import deepspeed.comm as dist

    if not dist.is_initialized() or dist.get_rank() == 0:
        lines = text.splitlines()
        _print("\n".join(line if line.startswith("ds_fp8: ") else f"ds_fp8: {line}" for line in lines))


def _print(text: str) -> None:
    """A line of its own: where a trainer's progress bar stands on the last line, tqdm takes it away meanwhile."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if bars is not None and getattr(bars, "_instances", None):
        bars.write(text)
        sys.stdout.flush()
    else:
        print(text, flush=True)
