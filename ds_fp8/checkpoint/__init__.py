"""Checkpoints that outlive the plugin: DeepSpeed's own files, with the exact quantized values beside the fp32 numbers.

A ds_fp8 checkpoint *is* a DeepSpeed checkpoint. The optimizer shard holds fp32 flats under DeepSpeed's names, so
`zero_to_fp32.py`, universal conversion and a job without the plugin read it; under the key `ds_fp8` it also holds the
exact quantized values (`zero/states.py`), so that a resume with the same layout continues bit for bit. Amax histories
and scales of the layers travel in the client state (`engine/checkpointing.py`).

Contract for `engine`: in place of DeepSpeedEngine.load_checkpoint call

    load_checkpoint(original, engine, *args, check_client_state=None, **kwargs)      what `original` returns

which reads everything that this rank will load *before* anything is changed, on all ranks; a truncated, foreign or
newer file raises CheckpointError on every rank and leaves the engine as it was. `check_client_state(state, path)` may
raise too. Saving needs no help: the optimizer's `state_dict()` brings its quantized values.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..zero.touched import touched

TOUCHED = {
    "Engine": touched(reads="load_checkpoint"),
}

__all__ = ["inspect", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    """Loading needs torch and DeepSpeed, judging a folder (`complete.py`) neither: they are imported when asked for."""
    if name not in __all__:
        raise AttributeError(name)
    module = import_module(".loading", __name__)
    globals().update(inspect=module.inspect, load_checkpoint=module.load_checkpoint)
    return globals()[name]
