"""The compile at first use by many ranks at once, and the library on a CPU that lacks what this one has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_fp8.kernels.cpu import build, loader

ROOT = Path(build.__file__).resolve().parents[3]

COMPILER = """#!/bin/sh
# Stands for the compiler: as slow, a thousandth of the work. Notes every link.
for last; do :; done
case "$*" in
  --version) echo "fake 1.0"; exit ;;
  *-shared*) echo link >>"$NOTES"; sleep 0.3 ;;
esac
[ -z "$REFUSE" ] || { echo "no room on the disk" >&2; exit 1; }
echo "$last of a library" >"$last"
"""


@pytest.fixture
def start(tmp_path):
    """Start a process with an empty cache and the fake compiler; returns it."""
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    code = (
        "from ds_fp8.kernels.cpu import build; build.PATIENCE_S = 1.0; build.HEARTBEAT_S = 0.1; "
        "print(build.build_cached())"
    )
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DS_FP8_DISABLE": "1",
        "CXX": str(compiler),
        "NOTES": str(tmp_path / "notes"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def one(**more):
        return subprocess.Popen(
            [sys.executable, "-c", code], env={**env, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return one


def links(tmp_path):
    notes = tmp_path / "notes"
    return len(notes.read_text().split()) if notes.exists() else 0


def test_many_ranks_on_one_cache_make_one_library(start, tmp_path):
    """Eight start together with an empty cache: one compiles, all get the same file, and nothing else is left."""
    ends = [(*process.communicate(timeout=120), process.returncode) for process in [start() for _ in range(8)]]
    assert [code for *_, code in ends] == [0] * 8, ends
    (library,) = {said.strip() for said, *_ in ends}
    assert Path(library).read_text().endswith("of a library\n")
    assert links(tmp_path) == 1
    assert [file.name for file in Path(library).parent.iterdir()] == [build.library_name()]


def test_a_lock_of_a_dead_rank_costs_patience_only(start, tmp_path):
    """Killed in the middle: the next ones wait, take the lock away, and one of them compiles."""
    process = start()
    said, errors = process.communicate(timeout=60)
    library = Path(said.strip())
    assert process.returncode == 0, errors
    library.unlink()
    (library.parent / "building").touch()
    ends = [process.wait(timeout=120) for process in [start() for _ in range(4)]]
    assert ends == [0] * 4 and library.exists()
    assert not (library.parent / "building").exists()


def test_a_compiler_that_refuses_is_quoted_to_those_who_wait(start, tmp_path):
    """Sixty-four ranks must not meet the same full disk one after the other; a later start tries again."""
    ends = [
        (process.communicate(timeout=120)[1], process.returncode) for process in [start(REFUSE="1") for _ in range(8)]
    ]
    assert all(code != 0 and "no room on the disk" in errors for errors, code in ends), ends
    assert start().wait(timeout=60) == 0


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
@pytest.mark.skipif(build.machine() != "x86_64", reason="looks for AVX")
def test_code_of_one_path_is_shared_with_no_other():
    """Vector code lies in functions of its own unit: a function that the linker merges would crash an older CPU."""
    library = loader.load()
    if library is None:
        pytest.skip("no compiled kernels here")
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library._name], capture_output=True, text=True).stdout
    found, function = set(), ""
    for line in text.splitlines():
        head = re.match(r"[0-9a-f]+ <(.*)>:", line)
        if head:
            function = head.group(1)
        elif re.search(r"\tv[a-z0-9]+ .*%[xyz]mm|%zmm", line):
            found.add(function)
    assert len(found) > 20, "the disassembly was not read"
    assert [name for name in found if "_GLOBAL__N_1" not in name] == []


DRIVER = """
import ctypes, struct
library = ctypes.CDLL({path!r})
library.ds_fp8_choose.restype = ctypes.c_char_p
library.ds_fp8_run.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
class Job(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("x", "quantized", "scale", "amax")),
                ("numel", ctypes.c_int64), ("dtype", ctypes.c_int32), ("fmt", ctypes.c_int32)]
values = (ctypes.c_float * 1000)(*(((i * 7919) % 2003 - 1001) / 3 for i in range(1000)))
for best in (2, 1, 0):
    quantized, scale, amax = (ctypes.c_uint8 * 1000)(), ctypes.c_float(1.25), ctypes.c_float()
    job = Job(*map(ctypes.addressof, (values, quantized, scale, amax)), 1000, 0, 0)
    name = library.ds_fp8_choose(best).decode()
    library.ds_fp8_run(0, ctypes.byref(job), 8, 256, 1)
    print(name, amax.value, bytes(quantized).hex())
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is the CPU without AVX-512")
def test_a_cpu_without_avx512_runs_the_next_path_with_the_same_bits():
    """Valgrind's CPU has AVX2 and no AVX-512: one library, chosen at run time, the quantized values of this CPU's best
    path.
    """
    library = loader.load()
    if library is None:
        pytest.skip("no compiled kernels here")
    command = [sys.executable, "-S", "-c", DRIVER.format(path=library._name)]
    here, there = (
        [line.split() for line in subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()]
        for words in (command, ["valgrind", "--tool=none", "-q", *command])
    )
    assert [name for name, *_ in there] == ["avx2", "avx2", "portable"]
    assert {tuple(result) for _, *result in here} == {tuple(result) for _, *result in there}
    assert len({tuple(result) for _, *result in there}) == 1


def test_the_cache_is_private_whatever_the_umask(tmp_path, monkeypatch):
    """Code is loaded from there: mode 0700, also under umask 0; a folder that others may write is not used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    before = os.umask(0)
    try:
        folder = build.cache_dir()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    other = build.cache_dir()
    assert other != folder and other.parent.name == f"ds_fp8-{os.getuid()}" and other.stat().st_mode & 0o777 == 0o700
    other.chmod(0o777)
    with pytest.raises(build.BuildError, match="writable by"):
        build.cache_dir()


def test_nobody_else_can_exchange_the_cache(tmp_path, monkeypatch):
    """A link in a shared folder is pointed elsewhere after we have looked; a folder below one that others may write is
    renamed away, and theirs takes its place; a relative XDG_CACHE_HOME is whatever lies where somebody went.
    """
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    shared.mkdir()
    mine.mkdir(mode=0o700)
    (shared / f"ds_fp8-{os.getuid()}").symlink_to(mine)
    shared.chmod(0o1777)
    monkeypatch.setenv("HOME", str(shared / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(mine))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(shared))
    assert build.cache_dir().is_relative_to(mine)
    tmp_path.chmod(0o777)
    with pytest.raises(build.BuildError, match=r"above .*link or a file"):
        build.cache_dir()
    tmp_path.chmod(0o700)
    (mine / "ds_fp8").rename(mine / "elsewhere")
    (mine / "ds_fp8").symlink_to(mine / "elsewhere")
    with pytest.raises(build.BuildError, match=r"link or a file.*link or a file"):
        build.cache_dir()
    monkeypatch.chdir(mine)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache_dir().is_relative_to(tmp_path / "home" / ".cache")


NOBODY = """
import os
import torch
os.setgid(54321); os.setuid(54321)
for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
    os.environ.pop(name, None)
import tempfile
tempfile.tempdir = {place!r}
from ds_fp8.kernels.cpu import build
build.library_name = lambda: "none.so"  # a wheel without kernels
from ds_fp8 import kernels
from ds_fp8.formats import E4M3
print(kernels.path("cpu"), kernels.quantize(torch.tensor([1.0, -3.0]), 2.0, E4M3).float().tolist())
"""


def _others_may_read(folder: Path) -> bool:
    return all(one.stat().st_mode & 0o005 == 0o005 for one in (folder, *folder.parents))


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes somebody without a passwd entry")
@pytest.mark.skipif(
    not all(map(_others_may_read, (ROOT, Path(sys.prefix), Path(sys.base_prefix)))),
    reason="installed where others may not read",
)
def test_nobody_without_a_home_or_a_folder_trains_with_pytorch(tmp_path):
    """A container's random user id, nothing writable: two ranks fall back, the first one says why, and the numbers are
    the same.
    """
    place = tmp_path / "read-only"
    place.mkdir(mode=0o555)
    code = NOBODY.format(place=str(place))
    for rank in "01":
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_RANK": rank, "DS_FP8_DISABLE": "1"},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split("\n")[0] == "torch [2.0, -6.0]"
        assert ("PyTorch does their work" in done.stderr) == (rank == "0"), done.stderr
        assert "Traceback" not in done.stderr


def test_a_full_disk_is_met_once(tmp_path, monkeypatch):
    """The refusal lies beside the lock, though not a byte of it could be written: who waits does not compile again."""
    calls = []

    def full(folder: Path) -> Path:
        calls.append(folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "build", full)
    folder = build.cache_dir()
    lock, refusal = folder / "building", folder / "refused"
    lock.touch()  # another rank is at it, and leaves an empty refusal

    def gives_up(library, lock):
        refusal.touch()
        lock.unlink()

    monkeypatch.setattr(build, "_wait", gives_up)
    with pytest.raises(build.BuildError, match="disk is full"):
        build.build_cached()
    assert calls == []


def test_no_home_and_a_full_disk_are_refusals_not_errors(tmp_path, monkeypatch):
    """A user id without a passwd entry has no home; whoever asks falls back to PyTorch on a BuildError."""
    from pathlib import Path

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert build.cache_dir().is_relative_to(tmp_path)

    def full(folder: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "build", full)
    with pytest.raises(build.BuildError, match="No space left"):
        build.build_cached()
