"""How long does a user wait for the compiler? The build of the C++ kernels at install, and the compile at first use.

    python benchmarks/bench_build.py [--repeats 1]

    extension build   what setup.py runs for a wheel: three paths of the same sources, on all cores
    wheel             `pip wheel` without and with the kernels; no isolation, so that nothing is downloaded
    first use         a fresh Python with an empty cache loads the kernels, and again when they are cached

Everything happens in temporary folders on a copy of the sources; neither the checkout nor the user's cache is touched.
CPU seconds of the compiler stand beside the wall time: they hardly depend on what else the machine does.
Goals: extension build and first use within 20 s each.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Report, Timing, alternate

ROOT = Path(__file__).resolve().parent.parent
GOAL_S = 20.0
SOURCES = ("ds_fp8", "schemas", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
HOOK_FILES = ("ds_fp8.pth", "ds_fp8.start")
FIRST_USE = """
from ds_fp8 import kernels
assert kernels.path("cpu") != "torch", "the kernels were not built"
"""


def copy_sources(target: Path) -> Path:
    """The package as a source distribution has it: no libraries, no caches."""
    target.mkdir()
    for name in (*SOURCES, *HOOK_FILES):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copyfile(ROOT / name, target / name)
    return target


def run(*command: str, cwd: Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")


def compiler_s() -> float:
    """CPU seconds of all finished children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(report: Report, what: str, function: Callable[[], Any], repeats: int) -> Timing:
    before = compiler_s()
    timing = alternate({what: function}, repeats=repeats, warmup=0)[what]
    cpu_s = (compiler_s() - before) / repeats
    report.timing(f"{what} ({cpu_s:.1f} s of CPU)", "compiler", timing, value=timing.median_s, unit="s")
    return timing


def wheel(source: Path, kernels: str) -> None:
    with tempfile.TemporaryDirectory() as out:
        command = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", out, ".")
        run(*command, cwd=source, DS_FP8_BUILD_KERNELS=kernels)
        assert any(Path(out).glob("ds_fp8-*.whl")), "no wheel came out"


def first_use(source: Path, cache: Path) -> None:
    run("-c", FIRST_USE, cwd=source, PYTHONPATH=str(source), XDG_CACHE_HOME=str(cache))


def cold_first_use(source: Path, folder: Path) -> float:
    """Seconds of loading with an empty cache, in a process of its own."""
    cache = Path(tempfile.mkdtemp(dir=folder))
    begun = time.perf_counter()
    first_use(source, cache)
    taken = time.perf_counter() - begun
    assert list(cache.glob("ds_fp8/*/*.so")), "the cache is empty: another library was loaded"
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    repeats = parser.parse_args().repeats
    report = Report("build", "How long does a user wait for the compiler?")
    with tempfile.TemporaryDirectory(prefix="bench_build_") as name:
        folder = Path(name)
        source = copy_sources(folder / "source")
        build = source / "ds_fp8" / "kernels" / "cpu" / "build.py"
        out = folder / "out"
        built = measure(report, "extension build", lambda: run(str(build), str(out), cwd=source), repeats)
        assert list(out.glob("*.so")), "no library came out"
        cold = measure(report, "first use, compiled", lambda: cold_first_use(source, folder), repeats)
        cache = folder / "warm"
        first_use(source, cache)
        warm = measure(report, "first use, cached", lambda: first_use(source, cache), max(repeats, 3))
        baseline = measure(report, "wheel without kernels", lambda: wheel(source, "0"), repeats)
        whole = measure(report, "wheel with kernels", lambda: wheel(source, "1"), repeats)
    added_s = cold.median_s - warm.median_s
    for what, taken_s, peer in (
        (
            "extension build at install",
            built.median_s,
            f"pip wheel {baseline.median_s:.1f} s without, {whole.median_s:.1f} s with",
        ),
        ("compile at first use", added_s, f"a start with cached kernels {warm.median_s:.1f} s"),
    ):
        reason = f"{os.cpu_count()} cores; the CPU seconds of the compiler stand in the rows"
        report.goal(what, result=taken_s, goal=GOAL_S, unit="s", peer=peer, reason=reason, at_most=True)
    report.write()


if __name__ == "__main__":
    main()
