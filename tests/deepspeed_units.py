"""DeepSpeed's own unit tests with the plugin and without: do as many pass?

    python tests/deepspeed_units.py PATH [--limit-s 600] [FILE ...]

PATH is a checkout of DeepSpeed (or an archive of its repository, unpacked) near the installed release; FILES are
relative to its `tests/unit`, by default a selection that runs on two CPU ranks. Each is run twice in turn, with
DS_FP8_DISABLE=1 and with the plugin's import hook open. No configuration in there has our sections: whatever differs is
ours.

Prints one line for each file and JSON at the end; exit code 1 where a test's outcome differs. Many of DeepSpeed's tests
skip or fail on a CPU: that is its own business, as long as it is the same in both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

SELECTION = (
    "runtime/test_ds_config_dict.py",
    "runtime/test_ds_config_model.py",
    "runtime/test_runtime_utils.py",
    "runtime/test_ds_initialize.py",
    "runtime/test_no_sync_ctxt.py",
    "runtime/test_multi_output_model.py",
    "runtime/half_precision/test_dynamic_loss_scale.py",
    "runtime/half_precision/test_zero_optim_overflow.py",
    "runtime/zero/test_zero_config.py",
    "runtime/zero/test_zero_context.py",
    "runtime/zero/test_zero_grad_clip.py",
    "runtime/zero/test_ignore_unused_parameters.py",
    "runtime/zero/test_zero_tensor_fragment.py",
    "runtime/zero/test_zero_tiled.py",
    "runtime/utils/test_partition.py",
    "checkpoint/test_latest_checkpoint.py",
    "checkpoint/test_tag_validation.py",
    "checkpoint/test_lr_scheduler.py",
    "checkpoint/test_zero_optimizer.py",
    "v1/half_precision/test_bf16.py",
    "v1/zero/test_zero_coalesce_grad_reduction.py",
    "comm/test_dist.py",
    "pipe/test_pipe_module.py",
    "monitor/test_monitor.py",
)


def run(tests: Path, file: str, with_plugin: bool, limit_s: float) -> dict[str, str]:
    """Test -> outcome."""
    environment = {key: value for key, value in os.environ.items() if key != "DS_FP8_DISABLE"}
    environment |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests)}
    if not with_plugin:
        environment["DS_FP8_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1", f"unit/{file}"]
        try:
            subprocess.run(command, cwd=tests, env=environment, capture_output=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {file: "timeout"}
        if not report.exists():
            return {file: "no report"}
        found = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            kinds = {child.tag for child in case}
            found[name] = (
                "failed"
                if "failure" in kinds
                else "error"
                if "error" in kinds
                else "skipped"
                if "skipped" in kinds
                else "passed"
            )
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--limit-s", type=float, default=600.0, help="for one run of one file")
    options = parser.parse_intermixed_args()
    given = options.path.resolve() / "tests"
    if not (given / "unit").is_dir():
        parser.error(f"{given}/unit: not there")
    # Alone: beside the checkout's own `deepspeed` the tests would run that one, and not the one that is installed.
    folder = tempfile.TemporaryDirectory(prefix="deepspeed_units_")
    tests = Path(folder.name) / "tests"
    shutil.copytree(given, tests)
    counts: dict[str, Counter[str]] = {"without": Counter(), "with": Counter()}
    differences = {}
    for file in options.files or SELECTION:
        if not (tests / "unit" / file).is_file():
            print(f"{file}: not in this release", flush=True)
            continue
        without, ours = (run(tests, file, plugin, options.limit_s) for plugin in (False, True))
        counts["without"].update(without.values())
        counts["with"].update(ours.values())
        differing = {
            name: (without.get(name), ours.get(name)) for name in without | ours if without.get(name) != ours.get(name)
        }
        differences |= differing
        shown = ", ".join(f"{number} {outcome}" for outcome, number in sorted(Counter(ours.values()).items()))
        print(f"{file}: {shown}" + (f"; DIFFERENT: {differing}" if differing else "; the same without"), flush=True)
    print(json.dumps({"counts": {key: dict(value) for key, value in counts.items()}, "differences": differences}))
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
