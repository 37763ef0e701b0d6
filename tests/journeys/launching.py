"""Start real launchers from a test: a fresh environment for each, a free port, and everything they said."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import ds_fp8

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_PARENT = Path(ds_fp8.__file__).resolve().parents[1]
# A worker of gloo that asks for the GIL in the moment in which Python ends makes C++ abort: seldom, on
# busy cores, and with any model (https://github.com/pytorch/pytorch/issues/190489).
ABORT_AT_EXIT = "terminate called without an active exception"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """One thread for each rank, the CPU, no rank variables of an outer job, and the package importable."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_FP8_DISABLE")
    }
    scripts = str(Path(sys.executable).parent)
    return {
        **inherited,
        "PATH": f"{scripts}{os.pathsep}{inherited.get('PATH', '')}",
        "PYTHONPATH": str(PACKAGE_PARENT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def launch(command: list[str], folder: Path, timeout_s: float = 240, **variables: str) -> tuple[int, str]:
    """Exit code, and stdout and stderr together; after `ABORT_AT_EXIT` of a second run in the folder as it was."""
    before = set(folder.rglob("*"))
    done = _run(command, folder, timeout_s, variables)
    if done.returncode and ABORT_AT_EXIT in done.stdout:
        warnings.warn(f"PyTorch aborted while Python ended, so this ran again: {command}", stacklevel=2)
        for path in set(folder.rglob("*")) - before:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        done = _run(command, folder, timeout_s, variables)
    return done.returncode, done.stdout


def _run(command: list[str], folder: Path, timeout_s: float, variables: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def command_of(name: str) -> str | None:
    """A program beside this Python, or on the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def hook_folder(folder: Path) -> Path:
    """A folder for PYTHONPATH whose `sitecustomize` does what the installed ds_fp8.pth does.

    Tests may run from a checkout that is not installed; then nothing would install the hook at Python's start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text((ROOT / "ds_fp8.pth").read_text())
    return folder
