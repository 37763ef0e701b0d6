"""The activation hook under every way of finding and importing DeepSpeed: whatever was asked before, the class is
hooked.

A DeepSpeed of three lines, so that a case costs a tenth of a second; `tests/journeys/test_natural_imports.py` does the
same with the real one and the real clients. Each case is a fresh Python whose start reads our .pth.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

from tests.journeys.launching import PACKAGE_PARENT, hook_folder

ENGINE = """
class DeepSpeedEngine:
    def __init__(self, config=None):
        self.config = config
        self.module = None

    def _configure_distributed_model(self, model):
        return model

    def _configure_optimizer(self, client_optimizer, model_parameters):
        return client_optimizer
"""

HEAD = """
import importlib, importlib.util, sys

def is_hooked(engine=None):
    engine_class = (engine or sys.modules["deepspeed.runtime.engine"]).DeepSpeedEngine
    return all(hasattr(vars(engine_class)[name], "ds_fp8_original")
               for name in ("_configure_distributed_model", "_configure_optimizer"))

class Front:
    '''A finder of somebody else, in front of ours.'''
    def __init__(self, find): self.find = find
    def find_spec(self, fullname, path=None, target=None):
        return self.find(fullname, path, target)
"""

CASES = {
    "one question": """
        importlib.util.find_spec("deepspeed")
        import deepspeed
    """,
    "many questions, by many threads, for the package and its modules": """
        import threading
        def ask():
            for _ in range(50):
                importlib.util.find_spec("deepspeed"), importlib.util.find_spec("deepspeed_missing")
        threads = [threading.Thread(target=ask) for _ in range(8)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert "deepspeed" not in sys.modules
        importlib.util.find_spec("deepspeed.runtime.engine")
        import deepspeed
    """,
    "a spec that was kept, run later": """
        spec = importlib.util.find_spec("deepspeed")
        module = sys.modules["deepspeed"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    """,
    "a spec of the engine's module that was kept, run twice": """
        import deepspeed.runtime
        sys.modules.pop("deepspeed.runtime.engine")
        spec = importlib.util.find_spec("deepspeed.runtime.engine")
        for _ in range(2):
            module = sys.modules["deepspeed.runtime.engine"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    """,
    "reload of the package": """
        import deepspeed
        importlib.reload(deepspeed)
    """,
    "reload of the engine's module": """
        import deepspeed.runtime.engine as engine
        before = engine.DeepSpeedEngine
        importlib.reload(engine)
        assert engine.DeepSpeedEngine is not before
    """,
    "forgotten and imported anew": """
        import deepspeed
        [sys.modules.pop(name) for name in list(sys.modules) if name.startswith("deepspeed")]
        importlib.util.find_spec("deepspeed")
        import deepspeed
    """,
    "the package alone forgotten, the engine's module kept": """
        import deepspeed
        sys.modules.pop("deepspeed")
        import deepspeed
    """,
    "the engine's module alone forgotten": """
        import deepspeed
        sys.modules.pop("deepspeed.runtime.engine")
        import deepspeed.runtime.engine
        deepspeed.DeepSpeedEngine = deepspeed.runtime.engine.DeepSpeedEngine
    """,
    "modules put back as they were before, as tests do": """
        from unittest import mock
        with mock.patch.dict(sys.modules):
            import deepspeed
        assert "deepspeed" not in sys.modules
        import deepspeed
    """,
    "the list of finders replaced for one import, as sandboxes do": """
        before = list(sys.meta_path)
        sys.meta_path = [finder for finder in before if type(finder).__name__ != "DeepSpeedFinder"]
        import deepspeed
        class Mine(deepspeed.DeepSpeedEngine): pass
        sys.meta_path = before
        assert not is_hooked()
        import colorsys
        assert hasattr(Mine._configure_optimizer, "ds_fp8_original"), "classes made meanwhile inherit the hook"
    """,
    "a path hook with a loader of its own, as beartype's and typeguard's": """
        from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader
        class Checking(SourceFileLoader): pass
        sys.path_hooks.insert(0, FileFinder.path_hook((Checking, SOURCE_SUFFIXES)))
        sys.path_importer_cache.clear()
        import deepspeed
        assert type(deepspeed.__loader__) is Checking
    """,
    "loaded by its path": """
        import deepspeed.runtime
        file = sys.modules.pop("deepspeed.runtime.engine").__file__
        spec = importlib.util.spec_from_file_location("deepspeed.runtime.engine", file)
        module = sys.modules["deepspeed.runtime.engine"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert not is_hooked(module)
        import colorsys
    """,
    "reload of our own modules": """
        import deepspeed, ds_fp8, ds_fp8.import_hook, ds_fp8.engine.patches
        importlib.reload(ds_fp8.engine.patches), importlib.reload(ds_fp8.import_hook), importlib.reload(ds_fp8)
        engine_class = deepspeed.DeepSpeedEngine
        assert not hasattr(engine_class._configure_optimizer.ds_fp8_original, "ds_fp8_original"), "wrapped once"
    """,
    "a lazy package": """
        spec = importlib.util.find_spec("deepspeed")
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = sys.modules["deepspeed"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert "deepspeed.runtime.engine" not in sys.modules
        module.DeepSpeedEngine
    """,
    "a finder that makes every module lazy, in front": """
        def find(fullname, path, target):
            for finder in sys.meta_path[1:]:
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader and fullname.startswith("deepspeed"):
                        spec.loader = importlib.util.LazyLoader(spec.loader)
                    return spec
        sys.meta_path.insert(0, Front(find))
        import deepspeed
        deepspeed.DeepSpeedEngine
    """,
    "a finder that makes every module lazy, behind": """
        from importlib.machinery import PathFinder
        def find(fullname, path, target):
            spec = PathFinder.find_spec(fullname, path, target)
            if spec and spec.loader and fullname.startswith("deepspeed"):
                spec.loader = importlib.util.LazyLoader(spec.loader)
            return spec
        ours = [type(finder).__name__ for finder in sys.meta_path].index("DeepSpeedFinder")
        sys.meta_path.insert(ours + 1, Front(find))
        importlib.import_module("deepspeed.runtime.engine")
        deepspeed, engine = sys.modules["deepspeed"], sys.modules["deepspeed.runtime.engine"]
        deepspeed.DeepSpeedEngine
        assert type(engine) is type(sys), "has been run"
    """,
    "a module with __getattr__ that imports when asked, as Transformers is": """
        import types
        class LazyModule(types.ModuleType):
            def __getattr__(self, name):
                return getattr(importlib.import_module("deepspeed"), name)
        client = LazyModule("client")
        importlib.util.find_spec("deepspeed")
        client.DeepSpeedEngine
    """,
    "a finder that asks importlib again, as wrapt's and ddtrace's do": """
        import threading
        here = threading.local()
        def find(fullname, path, target):
            if getattr(here, "busy", False):
                return None
            here.busy = True
            try:
                return importlib.util.find_spec(fullname)
            finally:
                here.busy = False
        sys.meta_path.insert(0, Front(find))
        import deepspeed
    """,
    "every finder wrapped by a tracer": """
        sys.meta_path[:] = [Front(finder.find_spec) for finder in sys.meta_path]
        import ds_fp8.import_hook
        ds_fp8.import_hook.install()
        import deepspeed
    """,
    "a finder in front that serves DeepSpeed past us; noticed at the next import": """
        from importlib.machinery import PathFinder
        sys.meta_path.insert(0, Front(lambda name, path, target:
            PathFinder.find_spec(name, path, target) if name.startswith("deepspeed") else None))
        import deepspeed
        assert not is_hooked()
        import colorsys
    """,
    "the import list emptied by somebody; mended when torch has been imported": """
        sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "DeepSpeedFinder"]
        from importlib.metadata import distribution
        (point,) = distribution("ds_fp8").entry_points.select(group="torch.backends")
        point.load()()
        import deepspeed
    """,
    "a first import that fails in the package": """
        import os
        os.environ["FAIL"] = "package"
        for _ in range(2):
            try: import deepspeed
            except RuntimeError: pass
        os.environ["FAIL"] = ""
        import deepspeed
    """,
    "a first import that fails in the engine's module": """
        import os
        os.environ["FAIL"] = "engine"
        for _ in range(2):
            try: import deepspeed
            except RuntimeError: pass
        os.environ["FAIL"] = ""
        import deepspeed
    """,
    "imported in a thread, while others ask": """
        import threading
        threads = [threading.Thread(target=lambda: __import__("deepspeed")) for _ in range(4)]
        threads += [threading.Thread(target=lambda: importlib.util.find_spec("deepspeed")) for _ in range(4)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    """,
    "the start method fork": """
        import multiprocessing
        importlib.util.find_spec("deepspeed")
        def child():
            import deepspeed
            sys.exit(0 if is_hooked() else 1)
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start(); process.join()
        assert process.exitcode == 0
        import deepspeed
    """,
    "the start method spawn": """
        import multiprocessing
        importlib.util.find_spec("deepspeed")
        pool = multiprocessing.get_context("spawn").Pool(1)
        import operator
        found = pool.apply(eval, ("[__import__('deepspeed'), all(hasattr(__import__('deepspeed').DeepSpeedEngine."
                                  "_configure_optimizer, 'ds_fp8_original') for _ in [0])][1]",))
        pool.close(); pool.join()
        assert found
        import deepspeed
    """,
    "typed into a running interpreter": """
        import code
        shell = code.InteractiveInterpreter()
        shell.runsource("import importlib.util; answer = importlib.util.find_spec('deepspeed')")
        shell.runsource("import deepspeed")
    """,
    "DeepSpeed first, the package later in a process without our .pth": """
        import ds_fp8.import_hook
        ds_fp8.import_hook.remove()
        [sys.modules.pop(name) for name in list(sys.modules) if name.startswith("ds_fp8")]
        import deepspeed
        assert not is_hooked()
        import ds_fp8
    """,
    "an editable install: a finder of its own that makes the spec by hand": """
        from pathlib import Path
        root = next(path for path in sys.path if (Path(path) / "deepspeed").is_dir())
        sys.path.remove(root)
        def find(fullname, path, target):
            if fullname == "deepspeed":
                file = Path(root, "deepspeed", "__init__.py")
                where = [str(file.parent)]
                return importlib.util.spec_from_file_location(fullname, file, submodule_search_locations=where)
        ours = [type(finder).__name__ for finder in sys.meta_path].index("DeepSpeedFinder")
        sys.meta_path.insert(ours + 1, Front(find))
        importlib.util.find_spec("deepspeed")
        import deepspeed
        assert deepspeed.__file__.startswith(root)
    """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DeepSpeed of three lines, and a site whose start reads ds_fp8.pth."""
    root = tmp_path_factory.mktemp("hook")
    runtime = root / "packages" / "deepspeed" / "runtime"
    runtime.mkdir(parents=True)
    fail = "import os\nif os.environ.get('FAIL') == '{}': raise RuntimeError('not now')\n"
    (runtime.parent / "__init__.py").write_text(
        "from .runtime.engine import DeepSpeedEngine\n" + fail.format("package")
    )
    (runtime / "__init__.py").write_text("")
    (runtime / "engine.py").write_text(ENGINE + fail.format("engine"))
    hook_folder(root / "import_hook")
    return root


def python(
    folder: Path,
    code: str,
    packages: str = "packages",
    ours: Path = PACKAGE_PARENT,
    flags: tuple[str, ...] = (),
    **variables: str,
) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "DS_FP8_DISABLE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder / "import_hook"), str(folder / packages), str(ours)])
    program = HEAD + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, *flags, "-c", program],
        capture_output=True,
        text=True,
        env={**environment, **variables},
        cwd=folder,
        timeout=120,
    )
    return f"{done.stdout}{done.stderr}".strip()


@pytest.mark.parametrize("case", CASES)
def test_the_engine_is_hooked_after(folder, case):
    code = textwrap.dedent(CASES[case]) + "\nimport deepspeed\nprint(is_hooked(), 'torch' in sys.modules)"
    assert python(folder, code) == "True False"


def test_a_start_of_python_brings_two_small_modules(folder):
    """Every Python of the environment pays for it: `typing` alone would be ten milliseconds."""
    code = "before = set(sys.modules)\nimport ds_fp8\nprint(sorted(set(sys.modules) - before - {'__future__'}))"
    assert python(folder, code, flags=("-S",)) == "['ds_fp8', 'ds_fp8.import_hook']"


@pytest.fixture(scope="module")
def own_python(folder):
    """A virtual environment that has our .pth in its site-packages, as an installed package does."""
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (site / "packages.pth").write_text(f"{folder / 'packages'}\n{PACKAGE_PARENT}\n")
    (site / "zz_ds_fp8.pth").write_text((folder / "import_hook" / "sitecustomize.py").read_text())
    return folder / "venv" / "bin" / "python"


@pytest.mark.parametrize("flags", ["-I", "-E", "-s", "-B -O", "-W error", "-X frozen_modules=off", "-X utf8 -u"])
def test_options_of_python(own_python, flags):
    """Isolated, without variables, without the user's folder; -S reads no .pth: see test_packaging.py for what torch
    does then.
    """
    code = f"{HEAD}\nimport deepspeed\nprint(is_hooked())"
    done = subprocess.run([own_python, *flags.split(), "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_zipped_packages(folder):
    """DeepSpeed in one zip, ours in another: both are imported by zipimport, and data files are still to be had."""
    for name, root in (("deepspeed", folder / "packages"), ("ds_fp8", PACKAGE_PARENT)):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for file in sorted((root / name).rglob("*.py")):
                archive.write(file, file.relative_to(root))
    code = """
        importlib.util.find_spec("deepspeed")
        import deepspeed, ds_fp8, ds_fp8.engine
        engine = sys.modules["deepspeed.runtime.engine"]
        assert ".zip" in ds_fp8.__file__ and ".zip" in engine.__file__
        assert b"class DeepSpeedEngine" in engine.__loader__.get_data(engine.__file__)
        print(is_hooked(), ds_fp8.is_active())
    """
    assert python(folder, code, packages="deepspeed.zip", ours=folder / "ds_fp8.zip") == "True True"


def test_the_switch_counts_when_deepspeed_is_imported(folder):
    """Set in the environment of the process or by the script itself: DeepSpeed's class is its own."""
    code = "import deepspeed\nprint(is_hooked() if hasattr(deepspeed.DeepSpeedEngine, 'x') else "
    code += "hasattr(deepspeed.DeepSpeedEngine._configure_optimizer, 'ds_fp8_original'))"
    assert python(folder, code, DS_FP8_DISABLE="1") == "False"
    assert python(folder, "import os\nos.environ['DS_FP8_DISABLE'] = '1'\n" + code) == "False"
    assert python(folder, code) == "True"


@pytest.mark.parametrize(("section", "refused"), [({"enabled": True}, True), ({"enabled": False}, False)])
def test_an_engine_that_runs_without_us_stops_the_job(folder, section, refused):
    """Imported past the hook, and built before any other import: at the next one the job ends with the reason."""
    code = f"""
        from importlib.machinery import PathFinder
        sys.meta_path.insert(0, Front(lambda name, path, target:
            PathFinder.find_spec(name, path, target) if name.startswith("deepspeed") else None))
        import deepspeed
        engine = deepspeed.DeepSpeedEngine({{"train_batch_size": 1, "bf16": {{"enabled": True}}, "fp8": {section}}})
        import colorsys
        print("went on")
    """
    said = python(folder, code)
    assert ("went on" not in said) == refused
    assert ("built before ds_fp8 was activated" in said) == refused


def test_the_spec_answers_as_the_one_that_python_finds_without_us(folder):
    """Sources, resources and isolation: tools that look at a spec see the loader's own answers."""
    code = """
        import inspect, pickle, copy
        spec = importlib.util.find_spec("deepspeed.runtime.engine")
        assert "class DeepSpeedEngine" in spec.loader.get_source("deepspeed.runtime.engine")
        assert spec.loader.path == spec.origin and spec.has_location
        import deepspeed
        assert "self.module = None" in inspect.getsource(deepspeed.DeepSpeedEngine)
        copy.copy(spec.loader)
        print("fine")
    """
    assert python(folder, code) == "fine"
