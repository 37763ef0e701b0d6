"""What torch.compile must not look into: scales and histories change from step to step, and guards on them would
compile everything anew each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def opaque(function: Function) -> Function:
    """`function` as one opaque call for torch.compile, and as itself without: `torch.compiler.disable` alone costs
    every eager call a change of Dynamo's callback, several microseconds of the host's time on a GPU's machine.
    """
    hidden = torch.compiler.disable(function)

    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        return hidden(*args, **named) if torch.compiler.is_compiling() else function(*args, **named)

    return run  # type: ignore[return-value]
