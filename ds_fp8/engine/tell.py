"""One place of output: rank 0, on stdout beside DeepSpeed's own log."""

from __future__ import annotations


def tell(text: str) -> None:
    """Print `text` as lines of ours, on rank 0."""
    import deepspeed.comm as dist

    if not dist.is_initialized() or dist.get_rank() == 0:
        print("\n".join(f"ds_fp8: {line}" for line in text.splitlines()), flush=True)
