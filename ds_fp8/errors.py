"""The errors that a user may see.

Every error of this package derives from `DsFp8Error`, so a launcher can catch one class. An error says where, what,
why it matters and the way out; a file with several mistakes gives one error that lists them all (`ConfigError`).
`assert` is for our own mistakes, these classes are for the user's.
"""

from __future__ import annotations

from dataclasses import dataclass


class DsFp8Error(Exception):
    """Base of all errors raised on purpose by ds_fp8."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    path     slash-separated keys from the top of the JSON, e.g. `fp8/margin`; empty for the whole file
    message  what is wrong with the value found there, and the way out
    line     1-based line in the file, 0 when the source has no lines (a dict)
    column   1-based column in the file, 0 when unknown
    severity `error` stops the job; `warning` is printed and training goes on
    """

    path: str
    message: str
    line: int = 0
    column: int = 0
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(DsFp8Error):
    """A configuration with one or more problems; all of them are listed, none is repaired in silence."""

    def __init__(self, source: str, problems: list[Problem] | tuple[Problem, ...]):
        self.source = source
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))


class PlanError(DsFp8Error):
    """The settings are valid, but this model, world or device cannot do what they ask for."""


class BackendError(DsFp8Error):
    """A backend (Transformer Engine, a kernel, a process group) cannot do what the plan gave it."""


class LayerError(BackendError, RuntimeError):
    """A forward or backward of an FP8 layer cannot do what it was called for; a RuntimeError, as nn.Linear's would
    be.
    """


class PrivateNameError(DsFp8Error):
    """The installed DeepSpeed differs from the one whose private names we hook; training unquantized is not an
    option.
    """


SeamError = PrivateNameError
"""Its name until 0.1.0; scripts may catch it."""


class NonFiniteError(DsFp8Error, RuntimeError):
    """Training goes on with a loss that is no number, and DeepSpeed takes the steps all the same."""


class CheckpointError(DsFp8Error):
    """A checkpoint is truncated, foreign or newer than this version; the engine was left as it was."""


class WeightError(DsFp8Error, RuntimeError):
    """A weight that O3 keeps as FP8 data cannot be read or written this way; where torch would raise, so do we."""


def printable(text: str) -> str:
    """For a terminal: names in a folder or a file of somebody else's may hold what moves the cursor, or renames the
    window.
    """
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)
