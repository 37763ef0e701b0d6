"""A shim for the `msamp` package, for scripts that say `from msamp import deepspeed`.

MS-AMP is unmaintained and does not import on today's DeepSpeed. Scripts written for it, and Accelerate's MS-AMP
backend, need four names of it: `msamp.initialize`, `msamp.deepspeed`, `msamp.clip_grad_norm_`, and to be found as
installed.

    import ds_fp8.compat
    ds_fp8.compat.install()              # before the first `import msamp`
    from msamp import deepspeed          # DeepSpeed itself, with the sections `fp8` and `msamp` understood

It is opt-in, as a package that answers to another's name must be asked for, and it is refused where the real one is
installed: then `from msamp import deepspeed` already means something. The JSON's `msamp` section needs none of this.

Accelerate asks by itself: `mixed_precision: fp8` with the backend MSAMP makes it look for the package. The import hook
answers that question, when Accelerate puts it and no real package does (`spec`), so its users write nothing more.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

from ..errors import DsFp8Error
from . import msamp_shim

NAME = "msamp"
DISTRIBUTION = "ms-amp"

_finder: _Finder | None = None


class _Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata` finds under `ms-amp`: Accelerate asks there before it believes in a module."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {msamp_shim.VERSION}\nSummary: shim of ds_fp8\n"

    def locate_file(self, path: Any) -> Any:
        return path


class _Finder:
    """A meta path entry that knows one distribution and no module."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:
        return None

    @staticmethod
    def find_distributions(context: importlib.metadata.DistributionFinder.Context) -> Iterator[_Distribution]:
        if context.name is None or context.name.lower().replace("_", "-") == DISTRIBUTION:
            yield _Distribution()


class _Loader:
    """Makes the shim when it is really imported; the question alone changes nothing."""

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        package, *inner = msamp_shim.modules()
        for module in inner:
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            sys.modules[module.__name__] = module
        return package

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        from ..engine import activate

        activate()


def spec() -> importlib.machinery.ModuleSpec:
    """What Accelerate finds under `msamp`."""
    return importlib.machinery.ModuleSpec(NAME, _Loader(), is_package=True)  # type: ignore[arg-type]


distributions = _Finder.find_distributions
"""What it finds under `ms-amp`."""


def real_package() -> str | None:
    """Where the real `msamp` lies, or None if there is none."""
    module = sys.modules.get(NAME)
    if module is not None:
        return None if getattr(module, "ds_fp8_shim", False) else getattr(module, "__file__", None) or NAME
    found = importlib.util.find_spec(NAME)
    return None if found is None else found.origin or NAME


def install() -> None:
    """Make `import msamp` find the shim, and activate ds_fp8. Twice is once; DsFp8Error beside the real package."""
    global _finder
    if is_installed():
        return
    real = real_package()
    if real is not None:
        raise DsFp8Error(
            f"ds_fp8.compat.install(): the real msamp is installed ({real}), and a shim would hide it.\n"
            "  Uninstall ms-amp, or import deepspeed itself: the msamp section of the JSON works without a shim."
        )
    for module in msamp_shim.modules():
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=module.__name__ == NAME)
        sys.modules[module.__name__] = module
    _finder = _Finder()
    sys.meta_path.append(_finder)  # type: ignore[arg-type]
    from ..engine import activate

    activate()


def uninstall() -> None:
    """Take the shim away again; ds_fp8 stays active."""
    global _finder
    if not is_installed():
        return
    for name in [name for name in sys.modules if name == NAME or name.startswith(NAME + ".")]:
        del sys.modules[name]
    if _finder is not None:
        sys.meta_path.remove(_finder)  # type: ignore[arg-type]
        _finder = None


def is_installed() -> bool:
    return getattr(sys.modules.get(NAME), "ds_fp8_shim", False)


__all__ = ["install", "is_installed", "real_package", "uninstall"]
