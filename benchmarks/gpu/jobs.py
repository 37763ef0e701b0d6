"""Starting `gpt_job.py` for one configuration and reading its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

FP8 = {"enabled": True, "recipe": "delayed", "backend": "torch"}
THEIRS = FP8 | {"backend": "transformer_engine"}
SECTIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"fp8": FP8},
    "O2 + fp8": {"fp8": FP8, "msamp": {"enabled": True, "opt_level": "O2"}},
    "fp8 transformer_engine": {"fp8": THEIRS},
    "O2 + fp8 transformer_engine": {"fp8": THEIRS, "msamp": {"enabled": True, "opt_level": "O2"}},
    "O1 + fp8": {"fp8": FP8, "msamp": {"enabled": True, "opt_level": "O1"}},
    "O3 + fp8": {"fp8": FP8, "msamp": {"enabled": True, "opt_level": "O3"}},
    "O3 expanded + fp8": {
        "fp8": FP8,
        "msamp": {"enabled": True, "opt_level": "O3", "exp_avg": "e4m3_expanded", "exp_avg_sq": "e4m3_expanded"},
    },
}
"""What the JSON says in each configuration."""


def train(job: dict[str, Any], seconds: float, ranks: int = 1) -> dict[str, Any]:
    """The job's result, `{"out of memory": ...}`, or `{"failed": reason}`; on `ranks` GPUs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(HERE / "gpt_job.py"), json.dumps(job)]
    environment = dict(os.environ, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result after {seconds:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    said = done.stderr or done.stdout
    # The first rank's own error; behind it a launcher says only that a rank failed.
    start = max(said.find("Traceback (most recent call last)"), 0) if ranks > 1 else max(len(said) - 1200, 0)
    return {"failed": said[start : start + 1200]}
