"""Find the compiled kernels, load them, and hand them PyTorch's threads.

In order: the library that the wheel brought (if it was made from exactly these sources), the user's cache, a compile
at first use. Without a compiler there is one warning and `load()` gives None: the caller then uses the PyTorch
reference, which is slower and computes the same bits.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from pathlib import Path
from typing import Any

from . import build, jobs

LOGGER = logging.getLogger("ds_fp8")
_PATHS = {"portable": 0, "avx2": 1, "avx512": 2}
_JOBS: dict[int, type[ctypes.Structure]] = {
    jobs.QUANTIZE: jobs.QuantizeJob,
    jobs.DEQUANTIZE: jobs.DequantizeJob,
    jobs.FLAT_ENCODE: jobs.FlatEncodeJob,
    jobs.FLAT_SUM: jobs.FlatSumJob,
    jobs.TILE_QUANTIZE: jobs.TileJob,
    jobs.TILE_DEQUANTIZE: jobs.TileJob,
    jobs.ADAM: jobs.AdamJob,
}

_lock = threading.Lock()
_loaded: ctypes.CDLL | None = None
_tried = False
_path = "torch"


def load() -> ctypes.CDLL | None:
    """The library, ready to run; None when there is none and none can be made. Thread-safe, tried once."""
    global _loaded, _tried
    if _tried:
        return _loaded
    with _lock:
        if not _tried:
            _loaded = _find()
            if _loaded is not None:
                choose(os.environ.get("DS_FP8_CPU_PATH", "avx512"), _loaded)
            _tried = True
    return _loaded


def path() -> str:
    """`avx512`, `avx2`, `portable`; `torch` when nothing could be loaded."""
    load()
    return _path


def choose(best: str, library: ctypes.CDLL | None = None) -> str:
    """Let nothing better than `best` run; returns the path that runs. For tests: all paths give the same bits."""
    global _path
    if best not in _PATHS:
        raise ValueError(f"DS_FP8_CPU_PATH: {best!r} is not one of {', '.join(_PATHS)}")
    library = library or load()
    if library is not None:
        _path = library.ds_fp8_choose(_PATHS[best]).decode()
    return _path


def _find() -> ctypes.CDLL | None:
    packaged = Path(__file__).with_name(build.library_name())
    if packaged.exists():
        try:
            return _open(packaged)
        except (OSError, AttributeError, ValueError) as error:
            LOGGER.info("ds_fp8: %s is not usable (%s); compiling", packaged, error)
    try:
        return _open(build.build_cached())
    except (build.BuildError, OSError, AttributeError, ValueError) as error:
        # Every rank falls back; one of each node says so.
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        LOGGER.log(
            logging.WARNING if first else logging.DEBUG,
            "ds_fp8: C++ kernels are not available, PyTorch does their work: same numbers, up to 60 times slower. "
            "Install g++ or clang++ and start again. Reason: %s",
            error,
        )
        return None


def _open(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    library.ds_fp8_sources.restype = ctypes.c_char_p
    library.ds_fp8_choose.restype = ctypes.c_char_p
    library.ds_fp8_choose.argtypes = (ctypes.c_int,)
    library.ds_fp8_job_bytes.restype = ctypes.c_int64
    library.ds_fp8_job_bytes.argtypes = (ctypes.c_int,)
    library.ds_fp8_run.restype = None
    library.ds_fp8_run.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
    library.ds_fp8_set_openmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    made_from = library.ds_fp8_sources().decode()
    if made_from != build.source_hash():
        raise ValueError(f"made from other sources ({made_from})")
    for operation, job in _JOBS.items():
        if library.ds_fp8_job_bytes(operation) != ctypes.sizeof(job):
            raise ValueError(f"{job.__name__} has {ctypes.sizeof(job)} bytes here, other in C++")
    _share_threads(library)
    return library


def _share_threads(library: ctypes.CDLL) -> None:
    """Give the library the OpenMP runtime that PyTorch has loaded, whichever it is."""
    runtime = _openmp_runtime()
    if runtime is None:
        return

    def entry(name: str) -> Any:
        return ctypes.cast(getattr(runtime, name), ctypes.c_void_p)

    try:
        entries = entry("GOMP_parallel"), entry("omp_get_thread_num"), entry("omp_get_num_threads")
    except AttributeError:
        return  # a runtime without the GNU entry points: std::threads
    library.ds_fp8_set_openmp(*entries)


def _openmp_runtime() -> ctypes.CDLL | None:
    """The OpenMP library in this process; PyTorch's own if several are there."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    files = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line and ".so" in line}
    runtimes = [file for file in files if Path(file).name.startswith(("libgomp", "libiomp5", "libomp"))]
    for file in sorted(runtimes, key=lambda file: "torch" not in file):
        try:
            return ctypes.CDLL(file)
        except OSError:
            continue
    return None
