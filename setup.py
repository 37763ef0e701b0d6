"""What the package is, and the two things a declarative file cannot say.

1. The door. `ds_fp8.pth` and `ds_fp8.start` must lie in the root of site-packages, where Python looks at start. A
   wheel gets them there from the root of the build; an editable install builds no such root, so its temporary wheel
   is given the same two files.
2. The kernels. With a C++ compiler at hand they are built into the wheel; without one they are built at first use,
   and without any compiler PyTorch does the work (slower, the same bits).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
DOOR = ("ds_fp8.pth", "ds_fp8.start")


def version() -> str:
    """The version stands once, in ds_fp8/__init__.py; read as text because importing it would open the door."""
    for line in (ROOT / "ds_fp8" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("ds_fp8/__init__.py: no __version__")


def build_kernels(target_dir: Path) -> None:
    """Compile the C++ kernels into `target_dir`; a machine that cannot is told so and gets the rest.

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


class BuildWithDoor(build_py):
    """build_py, plus the door in the wheel's root and the kernels beside their sources."""

    def run(self) -> None:
        if not getattr(self, "editable_mode", False):
            # A file that was deleted since the last build must not travel on.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if getattr(self, "editable_mode", False):
            build_kernels(ROOT / "ds_fp8" / "kernels" / "cpu")
            return
        for name in DOOR:
            shutil.copyfile(ROOT / name, Path(self.build_lib) / name)
        target = Path(self.build_lib) / "ds_fp8" / "kernels" / "cpu"
        target.mkdir(parents=True, exist_ok=True)
        build_kernels(target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        if not getattr(self, "editable_mode", False):
            outputs += [str(Path(self.build_lib) / name) for name in DOOR]
        return outputs


class EditableWithDoor(editable_wheel):
    """editable_wheel, plus the door in the root of the temporary wheel."""

    def _run_build_commands(self, dist_name, unpacked_wheel, build_lib, tmp_dir):
        files, mapping = super()._run_build_commands(dist_name, unpacked_wheel, build_lib, tmp_dir)
        for name in DOOR:
            shutil.copyfile(ROOT / name, Path(unpacked_wheel) / name)
        return files, mapping


setup(
    name="ds-fp8",
    version=version(),
    description="FP8 training for DeepSpeed by editing JSON: FP8 layers, wire, optimizer states and weights",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["ds_fp8", "ds_fp8.*"]), "ds_fp8.schemas"],
    package_dir={"ds_fp8.schemas": "schemas"},
    package_data={
        "ds_fp8": ["py.typed"],
        "ds_fp8.schemas": ["*.json"],
        "ds_fp8.kernels.cpu": ["*.cpp", "*.h", "*.hpp", "*.so"],
        "ds_fp8.cli": ["*.html", "*.css"],
    },
    install_requires=[
        "torch>=2.5",
        "deepspeed>=0.17.2",
        "jsonschema>=4.20",
        "hjson",
        "rich>=13",
        "safetensors>=0.4",
        "numpy",
    ],
    extras_require={
        "transformer-engine": ["transformer-engine[pytorch]>=2.2"],
        "triton": ["triton>=3.0"],
        "plot": ["matplotlib>=3.7"],
        "example": ["tqdm", "matplotlib>=3.7"],
        "test": ["pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "matplotlib>=3.7", "tqdm"],
        "dev": ["ruff", "mypy", "codespell", "pre-commit"],
    },
    entry_points={"console_scripts": ["ds_fp8 = ds_fp8.cli.main:main"]},
    cmdclass={"build_py": BuildWithDoor, "editable_wheel": EditableWithDoor},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
