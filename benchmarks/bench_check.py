"""How long does `ds_fp8 check` let people wait? Goal: an answer in less than half a second, process start included.

The peer is the only check there was before: importing DeepSpeed and letting it parse the file, which stops at the first
problem. The empty interpreter is the floor of every command.

    python benchmarks/bench_check.py [--repeats 9] [--write]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Report, alternate

GOAL_S = 0.5
PEER = "DeepSpeed's parser"
BAD = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 2, "reduce_bucket_sise": 5e7},
    "fp8": {"enabled": True, "margn": 1, "fp8_format": "E5M2"},
    "msamp": {"enabled": True, "opt_level": "O4"},
}
EXPECTED_ERRORS = 4


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="write the Markdown report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ds.json"
        file.write_text(json.dumps(BAD))
        answer = run("-m", "ds_fp8.cli.main", "check", "--json", str(file))
        found = [problem for problem in json.loads(answer.stdout)["problems"] if problem["severity"] == "error"]
        assert len(found) == EXPECTED_ERRORS, found
        deepspeed_parses = f"from deepspeed.runtime.config import DeepSpeedConfig; DeepSpeedConfig({str(file)!r})"
        timings = alternate(
            {
                "empty interpreter": lambda: run("-c", "pass"),
                "import ds_fp8.config": lambda: run("-c", "import ds_fp8.config"),
                "ds_fp8 check": lambda: run("-m", "ds_fp8.cli.main", "check", str(file)),
                PEER: lambda: run("-c", deepspeed_parses),
            },
            repeats=options.repeats,
            warmup=1,
        )
    report = Report("check", "How long does `ds_fp8 check` take?")
    for name, timing in timings.items():
        report.timing(name, "4 problems in a file", timing, value=timing.median_s * 1e3, unit="ms")
    report.goal(
        "check answers",
        result=timings["ds_fp8 check"].median_s,
        goal=GOAL_S,
        unit="s",
        at_most=True,
        reason=f"an empty interpreter takes {timings['empty interpreter'].median_s:.2f} s",
        peer=f"DeepSpeed's parser {timings[PEER].median_s:.1f} s",
    )
    report.note(f"DeepSpeed's parser stops at the first of its problems; check tells all {EXPECTED_ERRORS}")
    if options.write:
        report.write()


if __name__ == "__main__":
    main()
