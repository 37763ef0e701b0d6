"""The top level of the file, where DeepSpeed itself accepts every key in silence.

Three questions: is a key one of our sections misspelt (always an error: the job would train without FP8 and nobody
would know); is it one of DeepSpeed's keys misspelt (an error when it is only a slip away, because the section would be
ignored); or is it simply unknown (a warning: scripts may keep keys of their own, and `$schema` is for editors)?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from .contract import SECTIONS
from .other_words import TOP_LEVEL
from .suggest import completed, level_spelling, nearest

OURS_MISSPELT = {
    "float8": "fp8",
    "fp8config": "fp8",
    "fp8recipe": "fp8",
    "msampconfig": "msamp",
    "microsoftamp": "msamp",
}
"""Levelled spellings that are more than a slip away, and yet can only mean our sections."""

THEIRS_MISSPELT = {
    "bfp16": "bf16",
    "fb16": "bf16",
    "brainfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "zero": "zero_optimization",
    "zeroconfig": "zero_optimization",
    "batchsize": "train_batch_size",
    "microbatchsize": "train_micro_batch_size_per_gpu",
    "gradaccumulationsteps": "gradient_accumulation_steps",
    "gradaccumsteps": "gradient_accumulation_steps",
    "gradclip": "gradient_clipping",
    "maxgradnorm": "gradient_clipping",
}
"""Levelled spellings of DeepSpeed's sections that are near two of them, or near none."""

FOREIGN = frozenset({"$schema", "$comment", "comment", "description"})
"""Keys that are no setting of anyone."""


def meant_section(key: str, known: frozenset[str] = frozenset()) -> str | None:
    """Our section that `key` was meant to be, or None. DeepSpeed's own keys (`fp16`, `bf16`) are never meant so."""
    if key in SECTIONS or key in known:
        return None
    levelled = level_spelling(key)
    if levelled in SECTIONS:
        return levelled
    if levelled in OURS_MISSPELT:
        return OURS_MISSPELT[levelled]
    near = nearest(levelled, SECTIONS, 1)
    return None if near == "fp8" and not ("f" in levelled and "8" in levelled) else near


def meant_key(key: str, known: frozenset[str]) -> str | None:
    """DeepSpeed's top-level key that `key` is a slip of, or None.

    A slip is one edit, or two in a word of ten letters or more; `level_spelling` costs nothing. Shorter words are too
    close to one another (`fp16`, `bf16`) and must differ in case or separators only.
    """
    levelled = level_spelling(key)
    if levelled in THEIRS_MISSPELT:
        return THEIRS_MISSPELT[levelled]
    near = nearest(levelled, known, 0 if len(levelled) < 6 else 1 if len(levelled) < 10 else 2)
    return near or completed(levelled, known, least=8)


def judge(
    data: dict[str, Any], known: frozenset[str], asked: bool = False, homes: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[str, str, str]]:
    """(key, message, severity) for each top-level key that nobody knows.

    known  DeepSpeed's top-level keys
    asked  somebody asked (`check`): a job without our sections is judged too
    homes  key of one of DeepSpeed's sections -> that section, for keys that stand a level too high

    Without a section of ours, and unless somebody has asked, only a misspelt section of ours is reported: an unmodified
    DeepSpeed job is none of our business.
    """
    ours = asked or any(section in data for section in SECTIONS)
    for key in data:
        if not isinstance(key, str) or key in known or key in SECTIONS or key in FOREIGN:
            continue
        if section := meant_section(key, known):
            yield (
                key,
                f"unknown section; did you mean '{section}'? As it stands, FP8 would stay off in silence",
                "error",
            )
        elif ours and (name := meant_key(key, known)):
            message = f"unknown key; did you mean '{name}'? DeepSpeed ignores unknown top-level keys in silence"
            yield key, message, "error"
        elif ours and key in homes:
            message = f"stands at the top, where DeepSpeed ignores it in silence; it belongs into {homes[key]}"
            yield key, message, "warning" if homes[key] == "optimizer/params" else "error"
        elif ours and key in TOP_LEVEL:
            yield key, f"unknown key, which DeepSpeed ignores in silence; it belongs into {TOP_LEVEL[key]}", "warning"
        elif ours:
            yield key, "unknown key; DeepSpeed and ds_fp8 ignore it", "warning"
