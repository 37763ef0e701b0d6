"""What an install brings: the activation hook in the root of site-packages, schemas, sources of the kernels, the
command.

Built from a copy of the source tree, without a network: the build needs setuptools and nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

COPIED = ("ds_fp8", "schemas", "setup.py", "pyproject.toml", "README.md", "LICENSE", "ds_fp8.pth", "ds_fp8.start")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is packed, so that no build directory appears in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(source, folder / name)
    return folder


def build(tree: Path, kind: str) -> Path:
    """Build a wheel (`build_wheel` or `build_editable`) and unpack it as an installer would."""
    pytest.importorskip("wheel", reason="needs wheel to build")
    target = tree.parent / f"{tree.name}_{kind}"
    target.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.{kind}({str(target)!r}))"
    if (target / "site").exists():
        return target / "site"
    # Compiling the kernels takes a minute and is tested with them.
    env = {**os.environ, "DS_FP8_BUILD_KERNELS": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    site = target / "site"
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return site


COMPILER = """#!/bin/sh
for last; do :; done
[ "$1" = --version ] && echo "fake 1.0" || echo library >"$last"
"""


@pytest.mark.parametrize("compiler", ["there", "missing", "not asked"])
def test_a_wheel_is_of_the_platform_of_its_kernels(tree, tmp_path, compiler):
    """With kernels inside any Python of this platform takes it; without them any machine, also after a failed build."""
    program = tmp_path / "c++"
    program.write_text(COMPILER if compiler == "there" else "#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    asked = "0" if compiler == "not asked" else "1"
    env = {**os.environ, "CXX": str(program), "DS_FP8_BUILD_KERNELS": asked}
    command = ["wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), str(tree)]
    done = subprocess.run([sys.executable, "-m", "pip", *command], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_") if compiler == "there" else "any"
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        text = archive.read(next(name for name in names if name.endswith(".dist-info/WHEEL"))).decode()
    assert f"Tag: py3-none-{platform}" in text
    assert f"Root-Is-Purelib: {str(compiler != 'there').lower()}" in text
    assert any(name.endswith(".so") for name in names) == (compiler == "there")
    assert {"ds_fp8/__init__.py", "ds_fp8.pth", "ds_fp8.start"} <= set(names), "the root is the same in both"


def start_python(site: Path, code: str, **environment: str) -> str:
    """Start Python as if `site` were a site-packages folder: its .pth files are run."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DS_FP8_DISABLE")}
    program = f"import site, sys; site.addsitedir({str(site)!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=site,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["build_wheel", "build_editable"])
def test_an_install_puts_the_hook_in_at_pythons_start(tree, kind):
    """Wheel and editable: ds_fp8.pth and ds_fp8.start lie in the root, and DeepSpeed's import activates."""
    site = build(tree, kind)
    assert (site / "ds_fp8.pth").exists() and (site / "ds_fp8.start").exists()
    waiting = "any(type(finder).__name__ == 'DeepSpeedFinder' for finder in sys.meta_path)"
    assert start_python(site, f"print({waiting}, 'torch' in sys.modules)") == "True False"
    said = start_python(site, "import deepspeed, ds_fp8; print(ds_fp8.is_active())", DS_ACCELERATOR="cpu")
    assert said == "True"
    said = start_python(
        site, "import deepspeed, ds_fp8; print(ds_fp8.is_active())", DS_ACCELERATOR="cpu", DS_FP8_DISABLE="1"
    )
    assert said == "False"


def test_torch_calls_us_where_no_pth_file_is_read(tree):
    """`pip install --target` and PYTHONPATH: Python runs no .pth there, but torch finds the entry point of its
    extensions.
    """
    site = build(tree, "build_wheel")
    code = (
        "import importlib.util, sys, torch; before = 'ds_fp8' in sys.modules, 'deepspeed' in sys.modules;"
        "importlib.util.find_spec('deepspeed'); import deepspeed, ds_fp8; print(before, ds_fp8.is_active())"
    )
    env = {name: value for name, value in os.environ.items() if name != "DS_FP8_DISABLE"}
    # -S and a path by hand: no .pth file is read, not even that of an installed ds_fp8.
    folders = [str(site), *(path for path in sys.path if path.endswith("-packages"))]
    env |= {"PYTHONPATH": os.pathsep.join(folders), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, cwd=site, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "(True, False) True", done.stderr


def test_the_wheel_has_everything_that_runs(tree):
    """Schemas as ds_fp8.schemas, kernel sources for a build at first use, the command, the license."""
    names = {str(path.relative_to(site)) for site in [build(tree, "build_wheel")] for path in site.rglob("*")}
    assert {"ds_fp8/schemas/ds_fp8.schema.json", "ds_fp8/schemas/deepspeed.schema.json", "ds_fp8/py.typed"} <= names
    assert {"ds_fp8/cli/report.html", "ds_fp8/cli/report.css", "ds_fp8/cli/report.js"} <= names
    assert any(name.endswith(".cpp") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("tests" in name or name.startswith("build") for name in names)


def test_the_published_wheel_in_an_environment_of_its_own(tree, tmp_path):
    """`pip install` of the wheel beside nothing but its requirements: the command runs, the version is the package's
    own.
    """
    site = build(tree, "build_wheel")
    (wheel,) = site.parent.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    paths = [path for path in sys.path if path.endswith("-packages")]  # where the requirements are installed
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8, "fp8": {"enabled": true}}')
    command = [str(python), str(python.parent / "ds_fp8"), "check", str(tmp_path / "ds.json")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "ok: fp8" in done.stdout, done.stderr
    code = "import ds_fp8; print(ds_fp8.__file__)"
    said = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) in said


def test_what_an_index_shows(tree):
    """Author, keywords, systems and Pythons that were tested; the README renders (twine)."""
    from ds_fp8.releases import PYTHON

    site = build(tree, "build_wheel")
    text = next(site.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    for line in (
        "Author: ",
        "Keywords: fp8,deepspeed",
        "Classifier: Operating System :: POSIX :: Linux",
        f"Requires-Python: >={PYTHON.oldest}",
    ):
        assert f"\n{line}" in text
    shown = {line.rpartition(" ")[2] for line in text.splitlines() if "Programming Language :: Python :: 3." in line}
    assert shown == set(PYTHON.tested)
    pytest.importorskip("twine", reason="needs twine, the extra dev")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(next(site.parent.glob("*.whl")))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
