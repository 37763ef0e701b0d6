"""Typical mistakes in a DeepSpeed JSON: each is found at its place, and told with the cure that was meant.

`tests/data/mistakes` has the lists. A mistake is found when a problem stands at the place; its cure is right
when that problem's words hold the words of the list. All must be found, and 96 % of the cures be right: the last one is
often a guess.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from ds_fp8 import config

LISTS = sorted((Path(__file__).parents[1] / "data" / "mistakes").glob("*.txt"))

RIGHT = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
    "fp8": {"enabled": True},
    "msamp": {"enabled": True, "opt_level": "O2"},
}
"""The file in which the mistakes are made."""

LEAST_CURED = 0.96


def mistakes():
    texts = [path.read_text(encoding="utf-8") for path in LISTS]
    lines = [line for text in texts for line in text.splitlines() if line.strip() and line[0] != "#"]
    return [tuple(part.strip() for part in line.split(" | ", 3)) for line in lines]


def text_of(where: str, what: str) -> str:
    """The file with one mistake in it."""
    if where == "text":
        return what.replace("\\n", "\n")
    data = copy.deepcopy(RIGHT)
    renamed, _, new = where.partition(" -> ")
    if new:
        del data[renamed]
        data[new] = json.loads(what)
        return json.dumps(data, indent=1)
    if "O3" in what or (where.endswith("/stage") and what == "0"):
        data["msamp"]["opt_level"] = "O3"
    for path in where.removesuffix(" ->").split(", "):
        *parents, key = path.split("/")
        home = data
        for parent in parents:
            home = home[parent]
        if what == "-":
            home.pop(key)
        else:
            home[key] = json.loads(what)
    return json.dumps(data, indent=1)


def problems_at(text: str, place: str) -> list[str]:
    found = config.check_document(config.parse(text, "ds.json"))
    if place.replace(":", "").isdigit() or not place:
        return [problem.message for problem in found if not place or f"{problem.line}:{problem.column}" == place]
    return [problem.message for problem in found if problem.path == place]


def test_the_file_without_a_mistake_is_right():
    assert config.check(RIGHT) == []


def test_all_mistakes_are_found_and_most_are_cured():
    missed, uncured = [], []
    for where, what, place, cure in mistakes():
        messages = problems_at(text_of(where, what), place)
        if not messages:
            missed.append(f"{where} | {what}: nothing at {place!r}")
        elif not any(cure in message for message in messages):
            uncured.append(f"{where} | {what}: {messages}, without {cure!r}")
    count = len(mistakes())
    print(f"{count} mistakes: found {count - len(missed)}, right cure {count - len(missed) - len(uncured)}")
    print("\n".join([*missed, *uncured]))
    assert count >= 230 and missed == []
    assert count - len(uncured) >= LEAST_CURED * count, uncured


@pytest.mark.parametrize("place", ["line", "column"])
def test_problems_of_a_file_have_a_place(place):
    """A line and a column for each, a missing key's at the object that lacks it."""
    for where, what, _, _ in mistakes():
        for problem in config.check_document(config.parse(text_of(where, what), "ds.json")):
            assert getattr(problem, place) or not problem.path, (where, what, problem)
