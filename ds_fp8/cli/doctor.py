"""`ds_fp8 doctor`: does this machine fit, and if not, what exactly cures it.

It looks, it changes nothing: versions, DeepSpeed's seams, the device, Transformer Engine, the kernels, the door that
activates the plugin, and the `msamp` package if one is installed. Exit code 0: a job can run; 1: it cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from .probes import PROBES, Finding
from .tables import print_table

MARKS = {"ok": "ok", "note": "note", "fail": "FAIL"}


def main(argv: Sequence[str]) -> int:
    """Run all probes and print what they found."""
    parser = argparse.ArgumentParser(prog="ds_fp8 doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    # DeepSpeed logs to stdout when it is imported; stdout is for the answer.
    with contextlib.redirect_stdout(sys.stderr):
        findings = [finding for probe in PROBES for finding in _run(probe)]
    failed = [finding for finding in findings if finding.status == "fail"]
    if options.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
        return int(bool(failed))
    rows = [[MARKS[finding.status], finding.what, finding.found] for finding in findings]
    print_table("ds_fp8 doctor", ["", "what", "found"], rows)
    for finding in findings:
        if finding.cure:
            print(f"{MARKS[finding.status]}: {finding.what}: {finding.cure}")
    print(f"{len(failed)} thing(s) to repair before a job can run" if failed else "a job can run here")
    return int(bool(failed))


def _run(probe) -> list[Finding]:
    """A probe that breaks is itself a finding; the others still run."""
    try:
        return list(probe())
    except Exception as error:  # noqa: BLE001  # a diagnosis must survive whatever is broken here
        name = probe.__name__.replace("_", " ")
        return [Finding(name, f"{type(error).__name__}: {error}", "fail", "this probe broke; see the error beside it")]
