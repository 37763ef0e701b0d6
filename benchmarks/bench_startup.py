"""What the activation hook costs: Python's start, and the import of DeepSpeed, with and without the plugin's .pth.

    python benchmarks/bench_startup.py [--repeats 10]

Two virtual environments see the same packages and differ in one line: `ds_fp8.pth`. So both Pythons start as a user's
does, with site-packages read and every other .pth run, and the difference is the hook's alone. (`python -S` with and
without `import ds_fp8` overstates it: the first look into site-packages is then counted as the hook's.) Runs alternate,
and the median of the differences, pair by pair, is taken: of wall time, and of the process' CPU time, which hardly
depends on what else the machine does and is what the first goal goes by.

    python_start      nothing is imported: what every Python of the machine pays
    import_deepspeed  the whole import, and beside it the hooking alone, in a process that has DeepSpeed already:
                      seconds of noise do not drown that one

Goals: under 1 ms for Python's start, hooking under 1 % of DeepSpeed's import.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from harness import Report, Timing

ROOT = Path(__file__).resolve().parent.parent
START_GOAL_MS, IMPORT_GOAL_SHARE = 1.0, 0.01
HOOKING = """
import time, deepspeed
begun = time.perf_counter()
import ds_fp8
ds_fp8.activate()
assert ds_fp8.is_active()
print(time.perf_counter() - begun)
"""


def environment(**more: str) -> dict[str, str]:
    hidden = ("PYTHONPATH", "DS_FP8_DISABLE", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {"DS_ACCELERATOR": "cpu", **kept, **more}


def make_python(folder: Path, *, import_hook: bool) -> Path:
    """A Python that has this one's packages and our checkout on its path; `import_hook` adds the .pth."""
    venv.create(folder, symlinks=True, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    # A .pth adds these to sys.path without running the .pth files in them.
    packages = [path for path in sys.path if path.endswith("-packages")]
    (site / "packages.pth").write_text("\n".join([*packages, str(ROOT)]) + "\n")
    if import_hook:
        (site / "zz_ds_fp8.pth").write_text((ROOT / "ds_fp8.pth").read_text())
    return folder / "bin" / "python"


def seconds(python: Path, code: str) -> tuple[float, float]:
    """(wall time, CPU time) of a fresh Python that runs `code`."""
    begun = time.perf_counter()
    child = subprocess.Popen([python, "-c", code], env=environment(), stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{python} -c {code!r}: exit code {child.returncode}")
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime


def output(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], check=True, env=environment(), capture_output=True, text=True).stdout


def measure(report: Report, what: str, pythons: tuple[Path, Path], code: str, repeats: int) -> tuple[Timing, Timing]:
    """(without the activation hook, what the activation hook adds), CPU time both, after one untimed pair."""
    for python in pythons:
        seconds(python, code)
    pairs = [tuple(seconds(python, code) for python in pythons) for _ in range(repeats)]
    baseline = difference = None
    for clock, name in ((0, "wall"), (1, "CPU")):
        baseline = Timing.of([without[clock] for without, _ in pairs])
        difference = Timing.of([with_hook[clock] - without[clock] for without, with_hook in pairs])
        report.timing(f"without the activation hook, {name}", what, baseline, value=baseline.median_s * 1e3, unit="ms")
        report.timing(f"the activation hook adds, {name}", what, difference, value=difference.median_s * 1e3, unit="ms")
    return baseline, difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="pairs of imports; the start gets 20 times as many")
    repeats = parser.parse_args().repeats
    report = Report("startup", "What does the activation hook cost a Python that starts?")
    with tempfile.TemporaryDirectory(prefix="bench_startup_") as folder:
        baseline = make_python(Path(folder) / "unmodified", import_hook=False)
        hooked = make_python(Path(folder) / "hooked", import_hook=True)
        asks = "import sys, json; print(json.dumps('ds_fp8' in sys.modules))"
        assert [json.loads(output(python, asks)) for python in (baseline, hooked)] == [False, True]
        assert "True" in output(hooked, "import deepspeed, ds_fp8; print(ds_fp8.is_active())")
        start, added = measure(report, "python_start", (baseline, hooked), "pass", 20 * repeats)
        imported, _ = measure(report, "import_deepspeed", (baseline, hooked), "import deepspeed", repeats)
        hooking = Timing.of([float(output(baseline, HOOKING).splitlines()[-1]) for _ in range(max(repeats // 2, 3))])
    report.timing("hooking alone", "import_deepspeed", hooking, value=hooking.median_s * 1e3, unit="ms")
    report.goal(
        "the activation hook at Python's start",
        result=added.median_s * 1e3,
        goal=START_GOAL_MS,
        unit="ms",
        at_most=True,
        peer=f"python without {start.median_s * 1e3:.1f} ms",
        reason=f"CPU time; the quartiles of the pairs lie {added.spread * added.median_s * 1e3:.1f} ms apart",
    )
    report.goal(
        "hooking DeepSpeed, share of its import",
        result=hooking.median_s / imported.median_s * 100,
        goal=IMPORT_GOAL_SHARE * 100,
        unit="%",
        at_most=True,
        peer=f"import deepspeed {imported.median_s:.2f} s",
        reason=f"{hooking.median_s * 1e3:.1f} ms: the modules of ds_fp8.engine are read",
    )
    report.write()


if __name__ == "__main__":
    main()
