"""Does `ds_fp8 check` agree with DeepSpeed about configurations that people have written? Counts, and each
disagreement.

    python benchmarks/compare_check.py FOLDER ...      every JSON below, or in a git repository without a work tree

A file counts as a DeepSpeed configuration when its top level has two keys of DeepSpeed's. "auto" is filled in as the
Hugging Face Trainer does, and the world size is what the file's three batch sizes say. Then `DeepSpeedConfig` reads it,
and DeepSpeed builds or names its optimizer: that is the truth.

    false alarm   check has an error, DeepSpeed takes the file
    ignored       check has an error because a section stands where DeepSpeed ignores it in silence
    miss          DeepSpeed refuses the file, check has no error
    other device  DeepSpeed refuses it on this machine only (GDS without CUDA)

Parameters of optimizers and schedulers are judged by the signatures of DeepSpeed's and torch's classes
(`schemas/optimizers.json`), which `DeepSpeedConfig` does not look at: such findings are counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ds_fp8 import config
from ds_fp8.config.deepspeed_keys import top_level_keys

IGNORED = "where DeepSpeed ignores it in silence"
OTHER_DEVICE = "only supported for CUDA"
LARGEST_BYTES = 100_000
APART = ("optimizer", "scheduler")
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
FILLED = {
    "train_batch_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "steps_per_print": 10,
}
"""What the Trainer would write for "auto"; in sections DeepSpeed drops it, or the Trainer sets a number."""


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every JSON file of a folder, or of HEAD of a git repository without a work tree."""
    if (folder / "HEAD").exists():
        command = ["git", "-C", folder, "ls-tree", "-r", "-l", "HEAD"]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            facts, _, path = line.partition("\t")
            *_, name, size = facts.split()
            if path.endswith(".json") and size.isdigit() and int(size) < LARGEST_BYTES:
                blob = subprocess.run(["git", "-C", folder, "cat-file", "blob", name], capture_output=True, check=False)
                yield f"{folder.parent.name}:{path}", blob.stdout.decode(errors="replace")
        return
    for path in sorted(folder.rglob("*.json")):
        if path.is_file() and path.stat().st_size < LARGEST_BYTES:
            yield str(path), path.read_text(errors="replace")


def is_deepspeed(data: Any) -> bool:
    """Two top-level keys that only DeepSpeed has, or one and a batch size."""
    if not isinstance(data, dict):
        return False
    general = {
        "optimizer",
        "scheduler",
        "compression_training",
        "compile",
        "comet",
        "wandb",
        "tensorboard",
        "amp",
        "seed",
    }
    found = set(data) & top_level_keys()
    return len(found) >= 2 and bool(found - general)


def filled(data: dict[str, Any]) -> dict[str, Any]:
    """As the Trainer hands it over."""
    data = copy.deepcopy(data)
    for key, value in FILLED.items():
        if data.get(key) == "auto":
            data[key] = value
    if not any(key in data for key in BATCH[:2]):
        data["train_micro_batch_size_per_gpu"] = 1  # the Trainer and Accelerate fill in what is missing, too
    return data


def world_size(data: dict[str, Any]) -> int:
    """Ranks for which the batch sizes fit, else 1."""
    sizes = [data.get(key, 1) for key in BATCH]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or "train_batch_size" not in data:
        return 1
    total, micro, steps = sizes
    return max(1, total // (micro * steps)) if total % (micro * steps) == 0 else 1


def refusal(data: dict[str, Any]) -> str | None:
    """Why DeepSpeed refuses the file, in one line; None if it takes it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    ranks = world_size(data)

    class Ranks:
        """What DeepSpeed asks a model-parallel unit for."""

        @staticmethod
        def get_data_parallel_world_size() -> int:
            return ranks

        @staticmethod
        def get_model_parallel_world_size() -> int:
            return 1

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            DeepSpeedConfig(copy.deepcopy(data), mpu=Ranks)
    except Exception as error:  # noqa: BLE001  # any refusal is one
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    for folder in options.folders:
        for name, text in texts(folder):
            digest = hashlib.sha256("".join(text.split()).encode()).hexdigest()
            try:
                data = json.loads(text)
            except ValueError:
                continue
            if digest in seen or not is_deepspeed(data):
                continue
            seen.add(digest)
            data = filled(data)
            errors = [problem for problem in config.check(data) if problem.severity == "error"]
            apart = [problem for problem in errors if problem.path.split("/")[0] in APART]
            said, why = [problem for problem in errors if problem not in apart], refusal(data)
            kind = {(True, True): "both refuse", (False, False): "both take", (True, False): "false alarm"}.get(
                (bool(said), why is not None), "miss"
            )
            if kind == "false alarm" and all(IGNORED in one.message for one in said):
                kind = "ignored"
            kind = "other device" if why and OTHER_DEVICE in why else kind
            counts[kind] += 1
            counts["optimizer or scheduler"] += bool(apart)
            if kind in ("false alarm", "miss", "ignored", "other device"):
                print(f"{kind}: {name}: {why or '; '.join(f'{one.path}: {one.message}' for one in said)}")
            for problem in apart:
                print(f"apart: {name}: {problem.path}: {problem.message}")
    print(json.dumps({"configurations": len(seen), **counts}))
    return int(counts["miss"] + counts["false alarm"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
