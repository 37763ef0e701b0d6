"""The activation hook: it waits for DeepSpeed's import and activates the plugin then, so that JSON alone is enough.

`ds_fp8.pth` (and `ds_fp8.start` for Pythons that know PEP 829) runs `install()` at every start of Python, in the
`deepspeed` command, in its launcher and in every rank. So this file must be cheap: no torch, no DeepSpeed, no
importlib. It puts a finder at the front of `sys.meta_path` that waits for one module, `deepspeed.runtime.engine`: the
one whose class is hooked. Transformers, Accelerate, PEFT, TRL and Lightning ask for `deepspeed`
(`importlib.util.find_spec`) long before they import it, but not for that module. Questions, from any thread, change
nothing in any case: the finder stays, and its answer is a normal spec whose loader activates each time it has run the
module (first import, reload, import after a failure, lazy import).

Three more cases are covered, whatever is imported first:

- torch calls `after_torch_import()` (entry point of the group `torch.backends`) at the end of its own import, which
  comes before DeepSpeed's: where no .pth is read (`pip install --target`, a folder or zip on PYTHONPATH) or somebody
  has emptied `sys.meta_path`, the finder is put there now.
- The finder is asked for every module that is imported later. If the engine class is there and not hooked, because a
  finder in front of ours served it, it is hooked then; should a DeepSpeed engine with our sections be running
  already, that import fails with the reason.
- `ds_fp8 doctor ds.json --client trainer` imports what the client imports, in a process of its own, and looks.

`DS_FP8_DISABLE=1` keeps the hook off. It is a switch, not a setting: the environment never changes numerics.
"""

from __future__ import annotations

import os
import sys
from _thread import _local

DISABLE_VARIABLE = "DS_FP8_DISABLE"
ENGINE_MODULE = "deepspeed.runtime.engine"
ENGINE_CLASS = "DeepSpeedEngine"

_this_thread = _local()
_hooked: type | None = None
"""The engine class that was hooked last; a reload makes another one."""
_is_removed = False


class DeepSpeedFinder:
    """Waits for the module of DeepSpeed's engine class; finds nothing itself."""

    def find_spec(self, fullname, path=None, target=None):
        if _is_removed:
            return None  # somebody may have wrapped this finder, and keeps it
        if fullname != ENGINE_MODULE:
            if ENGINE_MODULE in sys.modules:
                _catch_up()
            return self._shim(path, target) if fullname == "msamp" else None
        if is_disabled() or getattr(_this_thread, "is_searching", False):
            return None  # the other finders, asked below, may ask us
        spec = self._ask_the_others(fullname, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _ActivatingLoader(spec.loader)
        return spec

    def _ask_the_others(self, fullname, path, target):
        """The spec that Python would have found without us, or None."""
        _this_thread.is_searching = True
        try:
            return self._first_answer(fullname, path, target)
        finally:
            _this_thread.is_searching = False

    def _first_answer(self, fullname, path, target):
        finders = list(sys.meta_path)
        # Those before us have been asked. Where we are not in the list somebody has wrapped us.
        for finder in finders[finders.index(self) + 1 :] if self in finders else finders:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                return spec
        return None

    def _shim(self, path, target):
        """`msamp`, for Accelerate's FP8 backend of that name: where no real package is, ds_fp8.compat serves it."""
        if is_disabled() or getattr(_this_thread, "is_searching", False) or not _is_asked_by_accelerate():
            return None
        real = self._ask_the_others("msamp", path, target)
        if real is not None:
            return real
        from . import compat

        self._serves_msamp = True
        return compat.spec()

    _serves_msamp = False

    def find_distributions(self, context):
        """`importlib.metadata`, which Accelerate asks after the module was found."""
        if not self._serves_msamp or context.name is None:
            return ()
        from . import compat

        return compat.distributions(context)


class _ActivatingLoader:
    """The loader that the module has anyway; each time it has run the module, the engine class is hooked."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        create_module = getattr(self._loader, "create_module", None)
        return None if create_module is None else create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        # Asked past the module's own attribute access: a lazy module (importlib.util.LazyLoader) would run for it.
        names = object.__getattribute__(module, "__dict__")
        if ENGINE_CLASS in names:
            _activate(names[ENGINE_CLASS])
            return
        spec = names.get("__spec__")
        if spec is not None and not isinstance(spec.loader, _ActivatingLoader):
            spec.loader = _ActivatingLoader(spec.loader)  # a lazy one, which put the real loader there for later

    def __getattr__(self, name):
        """Sources, data files, paths: whatever the loader can do."""
        if name == "_loader":
            raise AttributeError(name)  # copy and pickle ask before __init__ has run
        return getattr(self._loader, name)


def _is_asked_by_accelerate() -> bool:
    """Whether the innermost callers, importlib and other finders aside, are Accelerate's."""
    frame, left = sys._getframe(1).f_back, 8
    while frame is not None and left:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("accelerate."):
            return True
        left -= not name.startswith(("importlib", "ds_fp8."))
        frame = frame.f_back
    return False


def is_disabled() -> bool:
    """Whether the user turned the hook off with DS_FP8_DISABLE; `0` and the empty string leave it on."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def install() -> None:
    """Wait for DeepSpeed, or activate now if it is loaded already. Twice is the same as once.

    Raises DsFp8Error when an engine with our sections is running already, without us.
    """
    global _is_removed
    if is_disabled():
        return
    _is_removed = False
    if not any(isinstance(finder, DeepSpeedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, DeepSpeedFinder())
    if ENGINE_MODULE in sys.modules:
        _catch_up()


def after_torch_import() -> None:
    """Called by torch at the end of its import: the finder is there, whatever became of Python's start."""
    if not _is_removed:
        install()


def remove() -> None:
    """Stop waiting."""
    global _is_removed, _hooked
    _is_removed, _hooked = True, None
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, DeepSpeedFinder)]


def _catch_up() -> None:
    """Hook an engine class that was imported past the finder."""
    module = sys.modules.get(ENGINE_MODULE)
    if module is None:  # somebody forbids this import
        return
    engine_class = object.__getattribute__(module, "__dict__").get(ENGINE_CLASS)
    if engine_class is None or engine_class is _hooked or is_disabled():
        return
    if _activate(engine_class):
        from .engine import late

        late.refuse_engines_without_us(engine_class)


def _activate(engine_class: type) -> bool:
    """Hook this class; False when it was hooked already."""
    global _hooked
    _hooked = engine_class
    from .engine import patches

    return patches.install(engine_class)
