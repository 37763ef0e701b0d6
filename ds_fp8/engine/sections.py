"""Does this configuration speak of us at all? Asked for every engine, so it must be cheap and must not guess wrong.

Only when the answer is yes is `config` (and jsonschema with it) imported; it then decides about disabled sections,
misspelt names and values. A misspelt section (`fp-8`, `FP8`, `ms_amp`) counts as speaking of us: DeepSpeed accepts any
unknown key at the top in silence, which is how FP8 jobs come to train in bf16.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

SECTIONS = ("fp8", "msamp")
OTHERS = frozenset({"fp16", "bf16", "amp", "fp6", "fp32"})
"""Names of DeepSpeed, or of other plans, that are close to ours and are not ours."""


def sections_of(config: Any) -> list[str]:
    """Keys at the top of a DeepSpeed configuration that are our sections, or look as if they were meant to be."""
    if not isinstance(config, dict):
        return []
    return [key for key in config if isinstance(key, str) and _is_ours(key)]


def _is_ours(key: str) -> bool:
    plain = "".join(filter(str.isalnum, key)).lower()
    if plain in SECTIONS:
        return True
    if plain in OTHERS or not 2 < len(plain) < 8:
        return False
    return bool(get_close_matches(plain, SECTIONS, n=1, cutoff=0.85))


def source_name(arguments: list[str] | None = None) -> str:
    """The file named on the command line, for messages: DeepSpeed hands its engine a dict that has forgotten it."""
    arguments = sys.argv if arguments is None else arguments
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--deepspeed_config", "--deepspeed", "--deepspeed-config"):
            value = value or (arguments[position + 1] if position + 1 < len(arguments) else "")
            if value and not value.startswith("-") and Path(value).suffix in (".json", ".hjson"):
                return value
    return "ds_config"
