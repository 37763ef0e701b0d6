"""Which releases of what we stand on: the one table that setup.py, `ds_fp8 doctor`, the README and the matrix read.

A release of DeepSpeed is listed when the matrix (`tests/matrix.sh`) has passed on it; `docs/compatibility.md` is the
result. What differs between two of them lies in `zero/adapters`. A newer one than the newest listed is tried against the
table of private names (`zero/private_names.py`) and runs if everything matches.

Nothing is imported here: setup.py reads this file by its path.
"""

from __future__ import annotations

from typing import NamedTuple

DEEPSPEED = ("0.18.0", "0.18.3", "0.18.5", "0.19.0", "0.19.2", "0.19.6", "0.19.7", "0.19.8")
"""Tested releases of DeepSpeed, oldest first."""

RELEASED = (
    *(f"0.18.{patch}" for patch in range(10)),
    *(f"0.19.{patch}" for patch in range(9)),
)  # fmt: skip
"""All releases between them: what `tests/matrix.sh` tries. One that is not listed above runs as an unknown one does."""


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


REQUIRED = {
    "torch": Range("2.11", ("2.11", "2.13")),
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

PYTHON = Range("3.10", ("3.11", "3.12"))


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) from '2.13.0+cpu'; enough to compare releases."""
    parts = []
    for part in version.partition("+")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not digits or not part[0].isdigit():
            break
        parts.append(int(digits))
    return tuple(parts)


def is_newer_than_tested(version: str) -> bool:
    """Whether a DeepSpeed of this version came after the newest one that was tested."""
    return numbers(version) > numbers(DEEPSPEED[-1])
