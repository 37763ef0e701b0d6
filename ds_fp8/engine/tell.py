"""One place of output: rank 0, on stdout beside DeepSpeed's own log."""

from __future__ import annotations


def tell(text: str) -> None:
    """Print `text` on rank 0, each line marked as ours."""
    import deepspeed.comm as dist

    if not dist.is_initialized() or dist.get_rank() == 0:
        lines = text.splitlines()
        print("\n".join(line if line.startswith("ds_fp8: ") else f"ds_fp8: {line}" for line in lines), flush=True)
