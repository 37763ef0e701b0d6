"""Which releases of what we stand on: the one table that setup.py, `ds_fp8 doctor`, the README and the matrix read.

A release of DeepSpeed is listed when the matrix (`tests/matrix.sh`) has passed on it; `docs/compatibility.md` is the
result. What differs between two of them lies in `zero/adapters`. A newer one than the newest listed is tried against
the table of private names (`zero/private_names.py`) and runs if everything matches.

Nothing is imported here: setup.py reads this file by its path.
"""

from __future__ import annotations

from typing import NamedTuple

RELEASED = (
    *(f"0.18.{patch}" for patch in range(10)),
    *(f"0.19.{patch}" for patch in range(9)),
)  # fmt: skip
"""All releases of DeepSpeed that we stand for, oldest first: what `tests/matrix.sh` tries."""

NOT_RUN: tuple[str, ...] = ()
"""Of these, those that the matrix has not passed on yet: they run as unknown ones do."""

DEEPSPEED = tuple(release for release in RELEASED if release not in NOT_RUN)
"""Tested releases of DeepSpeed, oldest first."""


class Fault(NamedTuple):
    """What some releases of DeepSpeed do wrong by themselves, with or without a section of ours.

    first, last   the releases
    what          in one sentence, with the error that a user meets
    """

    first: str
    last: str
    what: str


FAULTS = (
    Fault(
        "0.18.7",
        "0.18.9",
        "over gloo ZeRO 1 and 2 stop in their first step with 'Output 0 of Split is a view and is being modified "
        "inplace': their flat weights still belong to autograd's graph (0.19.0 detaches them)",
    ),
)


class Range(NamedTuple):
    """What one distribution may be.

    oldest   oldest version that runs; empty: any
    tested   versions that were tested, oldest first; empty: nobody cares which
    """

    oldest: str
    tested: tuple[str, ...] = ()

    def requirement(self, name: str) -> str:
        """As pip takes it: `torch>=2.11`."""
        return f"{name}>={self.oldest}" if self.oldest else name

    @property
    def span(self) -> str:
        """Oldest and newest that were tested, in words; empty where nobody cares."""
        return f"{self.tested[0]} to {self.tested[-1]}" if len(self.tested) > 1 else "".join(self.tested)

    def outside(self, version: str) -> str:
        """In words, where `version` lies if it is not among the tested ones: `older than 2.11`; else empty."""
        if self.oldest and numbers(version) < numbers(self.oldest):
            return f"older than {self.oldest}"
        newest = numbers(self.tested[-1]) if self.tested else ()
        return f"newer than {self.tested[-1]}, not tested" if numbers(version)[: len(newest)] > newest else ""


REQUIRED = {
    "torch": Range("2.11", ("2.11", "2.13", "2.14")),
    "deepspeed": Range(DEEPSPEED[0], DEEPSPEED),
    "jsonschema": Range("4.20"),
    "hjson": Range(""),
    "rich": Range("13"),
    "safetensors": Range("0.4"),
    "numpy": Range(""),
}
"""Distributions without which nothing runs."""

OPTIONAL = {
    "transformer-engine": Range("2.4", ("2.11", "2.20")),
    "transformers": Range("4.57", ("5",)),
    "accelerate": Range("1.10", ("1.15",)),
    "triton": Range("3.0"),
}
"""Distributions that a job may bring."""

PYTHON = Range("3.10", ("3.10", "3.11", "3.12", "3.13"))


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) from '2.13.0+cpu'; enough to compare releases."""
    parts = []
    for part in version.partition("+")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not digits or not part[0].isdigit():
            break
        parts.append(int(digits))
    return tuple(parts)


def faults(version: str) -> list[str]:
    """What DeepSpeed `version` does wrong by itself."""
    return [fault.what for fault in FAULTS if numbers(fault.first) <= numbers(version) <= numbers(fault.last)]
