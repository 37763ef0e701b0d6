"""What a rule of refusals.py says, and what it may ask of a model: plain values, since no floor here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..capabilities import Host
from .positions import Path
from .settings import Settings


@dataclass(frozen=True)
class Refusal:
    """path  keys from the top of the JSON;  what  is refused and why;  cure  the way out, an imperative."""

    path: Path
    what: str
    cure: str

    def __str__(self) -> str:
        """For a list of problems, which has the path in front."""
        return f"{self.what}; {self.cure[0].lower()}{self.cure[1:]}"

    @property
    def text(self) -> str:
        """By itself, as an exception."""
        return f"{'/'.join(map(str, self.path))}: {self.what}.\n  {self.cure}."


@dataclass(frozen=True)
class Layer:
    """A module that FP8 layers could replace.

    multiplies  a Linear or its like; else a norm
    reason      why it is kept; empty where it is replaced
    """

    fqn: str
    kind: str
    multiplies: bool
    reason: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """What rules ask of a model that has been planned (`plan/make.py`).

    is_partial           one stage of a pipeline: what is missing here may be in another
    layers               every module that could compute in FP8; empty while `fp8` is off
    frozen_weights       names of the FP8 layers that have a frozen weight of their own
    matrices             names of the parameters with two dimensions
    unmatched_exclusions globs of msamp/weight_wire_exclude that mean no parameter
    fp8_weights          how many weights would travel as FP8 data; None where the level sends none
    """

    is_partial: bool
    layers: tuple[Layer, ...] = ()
    frozen_weights: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()
    unmatched_exclusions: tuple[str, ...] = ()
    fp8_weights: int | None = None


Rule = Callable[[Settings, "Host | None", "ModelFacts | None"], Iterator[Refusal]]
"""A rule asks nothing of a machine or a model that is not known."""
