"""pytest on `tests/gpu`: which tests ran on the device, and what failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from ledger import Ledger, main

ROOT = Path(__file__).resolve().parent.parent.parent


def body(ledger: Ledger) -> None:
    for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        report = ledger.out / f"{path.stem}.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x" if ledger.left() < 60 else "-q",
            "--tb=line",
            "-p",
            "no:cacheprovider",
        ]
        command += [f"--junitxml={report}", "--override-ini=timeout=0", str(path)]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=max(ledger.left(), 1),
                check=False,
            )
        except subprocess.TimeoutExpired:
            ledger.problem(path.name, "ran out of the budget")
            continue
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
        if not report.exists():
            ledger.problem(path.name, done.stdout[-1500:] + done.stderr[-500:])
            continue
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        ledger.record(path.name, {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped", "time")})
        for case in suite.iter("testcase"):
            for failure in [*case.iter("failure"), *case.iter("error")]:
                text = re.sub(r"\s+", " ", failure.get("message") or "")[:300]
                ledger.problem(f"{path.name}::{case.get('name')}", text)
        report.unlink()


if __name__ == "__main__":
    main("tests", body)
