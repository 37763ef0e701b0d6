"""Whether a configuration has our sections. Asked for every engine, so it must be cheap and right.

Only when the answer is yes is `config` (and jsonschema with it) imported; it then decides about disabled sections,
misspelt names and values. A misspelt section (`fp-8`, `FP8`, `ms_amp`) counts as ours: DeepSpeed accepts any
unknown key at the top level in silence, and the job would train in bf16.
"""

from __future__ import annotations

from typing import Any

from ..config.sections import SECTIONS, meant_section


def sections_of(config: Any) -> list[str]:
    """Keys at the top of a DeepSpeed configuration that are our sections, or look as if they were meant to be."""
    if not isinstance(config, dict):
        return []
    return [key for key in config if isinstance(key, str) and _is_ours(key)]


def _is_ours(key: str) -> bool:
    return key in SECTIONS or meant_section(key) is not None
