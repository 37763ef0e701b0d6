"""What is made once for each argument, most of all one class of ours for each class of a user."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

Make = TypeVar("Make", bound=Callable[..., Any])


def once_for_each(make: Make) -> Make:
    """`functools.cache` that keeps the signature: mypy takes a class of modules for something that has no hash."""
    return cast("Make", functools.cache(make))
