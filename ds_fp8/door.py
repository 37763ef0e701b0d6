"""The door: DeepSpeed's import is where the plugin steps in, so that JSON alone is enough.

`ds_fp8.pth` (and `ds_fp8.start` for Pythons that know PEP 829) runs `install()` at every start of Python, in the
`deepspeed` command, in its launcher and in every rank. So this file must cost nothing: no torch, no DeepSpeed, no
importlib.util until DeepSpeed is really asked for. A finder at the front of `sys.meta_path` waits for the name
`deepspeed`, lets the others find it, and activates once the module has run.

`DS_FP8_DISABLE=1` keeps the door shut. It is a switch, not a setting: the environment never changes numerics.
"""

from __future__ import annotations

import os
import sys

DISABLE_VARIABLE = "DS_FP8_DISABLE"


class DeepSpeedFinder:
    """Waits for `import deepspeed`; finds nothing itself."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "deepspeed" or self not in sys.meta_path:
            return None
        # Step aside for one search, else we would find ourselves.
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        try:
            spec = find_spec(fullname)
        except BaseException:
            sys.meta_path.insert(0, self)
            raise
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)  # not installed (yet): keep waiting
            return spec
        run_module = spec.loader.exec_module

        def run_module_then_activate(module):
            try:
                run_module(module)
            except BaseException:
                # A failed import may be tried again; the plugin must be there then.
                if self not in sys.meta_path:
                    sys.meta_path.insert(0, self)
                raise
            _activate()

        spec.loader.exec_module = run_module_then_activate
        return spec


def is_disabled() -> bool:
    """Whether the user shut the door with DS_FP8_DISABLE; `0` and the empty string leave it open."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def install() -> None:
    """Wait for DeepSpeed, or activate now if it is loaded already. Twice is the same as once."""
    if is_disabled():
        return
    if "deepspeed" in sys.modules and hasattr(sys.modules["deepspeed"], "initialize"):
        _activate()
        return
    if not any(isinstance(finder, DeepSpeedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, DeepSpeedFinder())


def remove() -> None:
    """Stop waiting."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, DeepSpeedFinder)]


def _activate() -> None:
    from .engine import activate

    activate()
