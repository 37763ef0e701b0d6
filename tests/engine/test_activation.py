"""The activation hook: what happens at Python's start, at DeepSpeed's import, and on the way back out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ds_fp8
from ds_fp8 import run
from ds_fp8.zero import private_names

ROOT = Path(ds_fp8.__file__).parents[1]


def python(code: str, **environment: str) -> str:
    """Run code in a fresh Python that knows the package; its last line of output."""
    import os

    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **environment}
    env.pop("DS_FP8_DISABLE", None) if "DS_FP8_DISABLE" not in environment else None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_importing_the_package_waits_for_deepspeed():
    """Nothing heavy is loaded before; the engine is hooked as soon as DeepSpeed has been imported."""
    code = (
        "import ds_fp8, sys; before = ds_fp8.is_active(), 'torch' in sys.modules; import deepspeed; "
        "print(before, ds_fp8.is_active())"
    )
    assert python(code) == "(False, False) True"


def test_importing_the_package_after_deepspeed_activates_at_once():
    """A script may well import ds_fp8 last. The variable keeps an installed .pth from being first."""
    code = (
        "import deepspeed, os; os.environ['DS_FP8_DISABLE'] = '0'; import ds_fp8, ds_fp8.import_hook; "
        "ds_fp8.import_hook.install(); print(ds_fp8.is_active())"
    )
    assert python(code, DS_FP8_DISABLE="1") == "True"


def test_disable_keeps_the_hook_off():
    """DS_FP8_DISABLE=1: DeepSpeed's class is its own."""
    code = "import ds_fp8, deepspeed; print(ds_fp8.is_active())"
    assert python(code, DS_FP8_DISABLE="1") == "False"


def test_a_failed_import_of_deepspeed_leaves_the_hook_in_place():
    """Some programs try twice; the second import must find the hook still there."""
    code = (
        "import sys, ds_fp8; sys.modules['torch'] = None\n"
        "try: import deepspeed\n"
        "except ImportError: pass\n"
        "del sys.modules['torch']\n"
        "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('deepspeed')]\n"
        "import deepspeed; print(ds_fp8.is_active())"
    )
    assert python(code) == "True"


def test_deactivate_restores_the_very_same_functions():
    """Not equal ones: the function objects that DeepSpeed defined."""
    import deepspeed

    from ds_fp8.engine import patches

    engine_class = deepspeed.DeepSpeedEngine
    ds_fp8.deactivate()
    theirs = {name: engine_class.__dict__[name] for name in patches.WRAPPERS}
    pipeline = vars(deepspeed.PipelineEngine)["__init__"]
    ds_fp8.activate()
    try:
        assert vars(deepspeed.PipelineEngine)["__init__"] is not pipeline
        assert all(engine_class.__dict__[name] is not theirs[name] for name in theirs)
        ds_fp8.activate()  # twice is once
        ds_fp8.deactivate()
        assert {name: engine_class.__dict__[name] for name in theirs} == theirs
        assert vars(deepspeed.PipelineEngine)["__init__"] is pipeline and "__init_subclass__" not in vars(engine_class)
        assert not ds_fp8.is_active()
    finally:
        ds_fp8.activate()


@pytest.mark.parametrize("method", private_names.METHODS, ids=lambda method: f"{method.owner}.{method.name}")
def test_the_installed_deepspeed_has_the_method(method):
    """The contract with DeepSpeed's private methods, one by one: the parameters that we were written for."""
    import deepspeed

    assert private_names.difference(method, deepspeed.__version__, private_names.live) is None


def test_a_release_newer_than_the_tested_ones_runs_if_all_is_there(monkeypatch):
    """It is compared in everything that its source tells; then one line says that it was not tested."""
    import deepspeed

    assert private_names.verify() == ""
    monkeypatch.setattr(deepspeed, "__version__", "0.19.99")
    assert "0.19.99 was not tested" in private_names.verify()
    private_names.installed_differences.cache_clear()
    monkeypatch.setattr(private_names, "differences", lambda *_, **__: iter(["x: has no y, which zero/z.py uses"]))
    with pytest.raises(private_names.PrivateNameError, match="has no y"):
        private_names.verify()
    private_names.installed_differences.cache_clear()


def test_a_release_older_than_the_oldest_known_is_refused(monkeypatch):
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", "0.17.6")
    with pytest.raises(private_names.PrivateNameError, match=r"older than 0\.18\.0"):
        private_names.verify(msamp=False)


def test_an_unknown_deepspeed_is_refused_with_every_difference(monkeypatch):
    """A renamed method and a changed signature: both named, with the reason and the way out."""
    import deepspeed
    from deepspeed.runtime import engine as module

    from ds_fp8.errors import PrivateNameError

    ds_fp8.deactivate()
    try:
        monkeypatch.setattr(module.DeepSpeedEngine, "_take_model_step", lambda self, surprise: None)
        monkeypatch.delattr(module.DeepSpeedEngine, "_configure_distributed_model")
        with pytest.raises(PrivateNameError) as caught:
            private_names.verify()
    finally:
        monkeypatch.undo()
        ds_fp8.activate()
    text = str(caught.value)
    assert deepspeed.__version__ in text and "enabled: false" in text
    assert "_configure_distributed_model: not there" in text and "takes (self, surprise)" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train.py", "--lr", "1"], ("train.py", False, ["--lr", "1"])),
        (["--local_rank=1", "train.py", "--lr", "1"], ("train.py", False, ["--local_rank=1", "--lr", "1"])),
        (["--local_rank=1", "-m", "pkg.train", "-x"], ("pkg.train", True, ["--local_rank=1", "-x"])),
    ],
)
def test_run_puts_the_launchers_argument_behind_the_script(arguments, expected):
    """`deepspeed --module ds_fp8.run train.py` passes --local_rank first."""
    assert run.split(arguments) == expected


def test_run_starts_a_script_with_the_plugin_active(tmp_path):
    """The script sees its own argv and folder, and a hooked DeepSpeed."""
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    (tmp_path / "train.py").write_text(
        "import sys, beside, deepspeed, ds_fp8\nprint(beside.NAME, sys.argv[1:], ds_fp8.is_active(), __name__)\n"
    )
    code = f"from ds_fp8.run import main; main(['--local_rank=0', {str(tmp_path / 'train.py')!r}, '--x'])"
    assert python(code) == "beside ['--local_rank=0', '--x'] True __main__"


@pytest.mark.parametrize("arguments", [[], ["--local_rank=0"], ["-m"], ["nowhere.py"]])
def test_run_says_how_it_is_used(arguments):
    with pytest.raises(SystemExit, match="usage"):
        run.main(arguments)
