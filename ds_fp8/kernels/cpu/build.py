"""Compile the C++ kernels: into the wheel by setup.py, or at first use into a cache of the user.

Three builds of the same sources (AVX-512, AVX2, portable) go into one shared library, which picks one at run time;
so a library built on one machine runs on every other of its architecture. No header of torch is included: that makes
it a matter of seconds, and one library serves every version of torch.

The cache must survive 64 ranks that start together on one NFS home, and a job that is killed in the middle. So a build
happens in a private directory and appears by an atomic rename; two builds at once are wasteful, never wrong. To save
the waste one rank builds and the others wait for its result, as long as it gives signs of life: a lock left behind by a
dead rank costs `PATIENCE_S`, it cannot hang a job. A compiler that refuses is asked once, not by every rank in turn.

This file imports nothing of the package: setup.py loads it by path, in an environment without torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Event, Thread

HERE = Path(__file__).resolve().parent
PATIENCE_S = 60.0
HEARTBEAT_S = 5.0
POLL_S = 0.1
SYSTEM_USERS = (0, 65534)
"""root; and how a container without privileges, or a file server, shows the root outside."""
COMPILE_LIMIT_S = 300.0

# Nothing may be fused or reassociated: the kernels promise the bits of the PyTorch reference.
COMMON_FLAGS = (
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno",
    "-ffp-contract=off",
    "-w",  # GCC 12 warns about its own intrinsics, ten thousand lines that cost a quarter of the build
)  # fmt: skip
PATH_FLAGS = {
    "avx512": (
        "-O3",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ),
    "avx2": ("-O3", "-mavx2", "-mfma", "-mf16c"),
    "portable": ("-O2",),  # everything is vectorised by hand; -O3 takes half as long again
}


class BuildError(RuntimeError):
    """No compiler, or it refused; the message holds what it said."""


def machine() -> str:
    """The architecture, as it stands in file names: x86_64, aarch64."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def library_name() -> str:
    return f"ds_fp8_cpu_{machine()}.so"


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Hash of everything that decides the machine code except the compiler; the library carries it."""
    digest = hashlib.sha256()
    for file in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    digest.update(repr((COMMON_FLAGS, PATH_FLAGS)).encode())
    return digest.hexdigest()[:20]


@lru_cache(maxsize=1)
def find_compiler() -> str:
    """$CXX, or the first C++ compiler on PATH. Raises BuildError if there is none."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise BuildError("no C++ compiler found; install g++ or clang++, or set CXX")


def compiler_version(compiler: str) -> str:
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False)
    return result.stdout.splitlines()[0] if result.stdout else compiler


def _objects(portable_only: bool = False) -> list[tuple[str, str, tuple[str, ...]]]:
    """(object name, source, flags) for every translation unit."""
    portable_only = portable_only or machine() != "x86_64"
    paths = ["portable"] if portable_only else ["avx512", "avx2", "portable"]
    one = ("-DDS_FP8_PORTABLE_ONLY",) if portable_only else ()
    objects = [
        ("abi", "abi.cpp", (f'-DDS_FP8_SOURCES="{source_hash()}"', "-O2", *one)),
        ("threads", "threads.cpp", ("-O2",)),
    ]
    for path in paths:
        defines = (f"-DPATH={path}", f"-DPATH_TABLE=path_{path}", f"-DADAM_RANGE=adam_{path}")
        # The longest first, so that two cores finish together.
        objects.insert(0, (f"adam_{path}", "adam.cpp", defines + PATH_FLAGS[path]))
        objects.append((f"casts_{path}", "paths.cpp", defines + PATH_FLAGS[path]))
    return objects


def _call(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stderr[-2000:]}")


def _umask() -> int:
    """The mask of this process, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def build(target_dir: Path | str, *, flags: tuple[str, ...] = (), portable_only: bool = False) -> Path:
    """Compile into `target_dir`; returns the library. Raises BuildError; leaves nothing half-written behind.

    flags          more of them, for the compiler and the linker (sanitizers)
    portable_only  without the paths for AVX2 and AVX-512
    """
    compiler = find_compiler()
    target_dir = Path(target_dir)
    target_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ds_fp8_build_") as private:

        def compile_one(unit: tuple[str, str, tuple[str, ...]]) -> str:
            name, source, of_unit = unit
            output = str(Path(private) / f"{name}.o")
            _call([compiler, *COMMON_FLAGS, *of_unit, *flags, "-c", str(HERE / source), "-o", output])
            return output

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, _objects(portable_only)))
        linked = Path(private) / library_name()
        _call([compiler, "-shared", "-pthread", "-Wl,--as-needed", *flags, *objects, "-o", str(linked)])
        # The private directory may be on another file system: copy beside the target first, then rename.
        handle, beside = tempfile.mkstemp(prefix=".", suffix=".so", dir=target_dir)
        os.close(handle)
        try:
            shutil.copyfile(linked, beside)
            Path(beside).chmod(0o777 & ~_umask())
            Path(beside).replace(target_dir / library_name())
        except BaseException:
            with contextlib.suppress(OSError):
                Path(beside).unlink()
            raise
    return target_dir / library_name()


def cache_dir() -> Path:
    """Where this user's build of these sources belongs: a directory that nobody else can write, since code is loaded
    from it.

    Raises BuildError where there is none: no home and no folder for temporary files, or somebody else's.
    """
    key = hashlib.sha256(f"{source_hash()}|{compiler_version(find_compiler())}|{machine()}".encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME", "")
    refusals = []
    try:
        # No home: a container with a user id that stands in no passwd. A relative path names another folder after
        # each `cd`, and is ignored, as the XDG specification wants it.
        home = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
        return _private(_private(home / "ds_fp8") / f"cpu-{key}")
    except (OSError, RuntimeError, BuildError) as error:
        refusals.append(str(error))
    try:
        fallback = _private(Path(tempfile.gettempdir()) / f"ds_fp8-{os.getuid()}")
        return _private(fallback / f"cpu-{key}")
    except (OSError, BuildError) as error:
        refusals.append(str(error))
    raise BuildError(f"no folder for compiled kernels: {'; '.join(refusals)}; set XDG_CACHE_HOME to one of your own")


def _private(folder: Path) -> Path:
    """The folder, made with mode 0700 whatever the umask; BuildError if it is not this user's alone.

    A link is refused: whoever made it points it elsewhere after we have looked. So is a folder below one in which
    somebody else may rename it.
    """
    _make(folder.parent)
    folder = folder.parent.resolve() / folder.name
    _make(folder)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode):
        raise BuildError(f"{folder} is a link or a file, not a folder")
    if state.st_uid != os.getuid() or _others_may_write(state):
        raise BuildError(f"{folder} belongs to, or is writable by, somebody else")
    for above in folder.parents:
        state = above.stat()
        sticky = bool(state.st_mode & stat.S_ISVTX)  # as /tmp: nobody renames what is not theirs
        if state.st_uid not in (os.getuid(), *SYSTEM_USERS) or (_others_may_write(state) and not sticky):
            raise BuildError(f"{above}, above {folder.name}, belongs to, or is writable by, somebody else")
    if not os.access(folder, os.W_OK):
        raise BuildError(f"{folder} cannot be written")
    return folder


def _make(folder: Path) -> None:
    """The folder and those above it, each with mode 0700 whatever the umask."""
    if os.path.lexists(folder):
        return
    _make(folder.parent)
    with contextlib.suppress(FileExistsError):  # another rank was faster
        folder.mkdir(mode=0o700)


def _others_may_write(state: os.stat_result) -> bool:
    """A group that has its user's number is that user's own, as most distributions make it."""
    group = state.st_mode & stat.S_IWGRP and state.st_gid != state.st_uid
    return bool(group or state.st_mode & stat.S_IWOTH)


def build_cached() -> Path:
    """The library in the user's cache, compiled if it is not there yet. Raises BuildError."""
    directory = cache_dir()
    try:
        return _built_in(directory)
    except OSError as error:  # a full disk, a quota, a folder that has gone
        raise BuildError(f"{directory}: {error.strerror or error}") from error


def _built_in(directory: Path) -> Path:
    library, lock, refusal = directory / library_name(), directory / "building", directory / "refused"
    while not library.exists():
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            _wait(library, lock)
            if not library.exists() and refusal.exists():
                said = refusal.read_text(encoding="utf-8")
                raise BuildError(said or f"{directory}: another rank could not build there, the disk is full") from None
            continue
        refusal.unlink(missing_ok=True)
        with _alive(lock):
            try:
                return build(directory)
            except (BuildError, OSError) as error:
                with contextlib.suppress(OSError):  # on a full disk its name alone speaks
                    refusal.write_text(str(error), encoding="utf-8")
                raise
    return library


@contextmanager
def _alive(lock: Path) -> Iterator[None]:
    """Touch `lock` again and again while the block runs, and remove it at the end."""
    done = Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                lock.touch()

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            lock.unlink()


def _wait(library: Path, lock: Path) -> None:
    """Until the library is there or the lock has gone. A lock that nobody touches for `PATIENCE_S` is removed."""
    seen, since = _state(lock), time.monotonic()
    while seen is not None and not library.exists():
        time.sleep(POLL_S)
        # Compared with itself only: clocks of an NFS server and of its clients differ.
        now = _state(lock)
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE_S:
            with contextlib.suppress(OSError):
                lock.unlink()


def _state(lock: Path) -> tuple[int, int] | None:
    """What changes with every sign of life; None without a lock."""
    try:
        found = lock.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


if __name__ == "__main__":
    begun = time.perf_counter()
    print(build(sys.argv[1] if len(sys.argv) > 1 else HERE), f"{time.perf_counter() - begun:.1f} s")
