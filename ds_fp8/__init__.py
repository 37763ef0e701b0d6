"""ds_fp8: FP8 training for DeepSpeed, by editing JSON.

    "fp8":   {"enabled": true, "recipe": "delayed", "fp8_format": "HYBRID"},
    "msamp": {"enabled": true, "opt_level": "O2"}

Importing this package hooks DeepSpeed, at once where DeepSpeed is loaded already, else when it
is imported. It imports neither torch nor DeepSpeed itself. `docs/architecture.md` is the reading order.
"""

from __future__ import annotations

from .import_hook import install as _install_import_hook

# mypy knows this name; importing `typing` for it would cost every start of Python ten milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "activate", "checkpoint_on_signal", "deactivate", "is_active"]


def activate() -> None:
    """Hook DeepSpeed's classes now; imports DeepSpeed. Calling it twice is the same as once."""
    from .engine import activate as _activate

    _activate()
    _install_import_hook()  # DeepSpeed's module may be run again later (importlib.reload)


def deactivate() -> None:
    """Give DeepSpeed's classes their own methods back, and forget the import hook. Engines made meanwhile stay as
    they are.
    """
    from .engine import deactivate as _deactivate
    from .import_hook import remove

    remove()
    _deactivate()


def is_active() -> bool:
    """Whether DeepSpeed's classes are hooked; asks without importing anything heavy."""
    import sys

    engine = sys.modules.get("ds_fp8.engine")
    return engine is not None and engine.is_active()


def checkpoint_on_signal(
    engine: Any,
    save_dir: str | os.PathLike[str],
    *,
    signals: Sequence[str] = ("SIGTERM", "SIGUSR1"),
    client_state: Callable[[], dict[str, Any]] | None = None,
    leave: bool = True,
) -> Any:
    """Save `engine` at the next step boundary after a signal, on all ranks; see `ds_fp8.engine.on_signal`."""
    from .engine.on_signal import checkpoint_on_signal as _arm

    return _arm(engine, save_dir, signals=signals, client_state=client_state, leave=leave)


_install_import_hook()
