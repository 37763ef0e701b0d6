"""Fill the support matrix:   python tests/support/run.py [--write docs/support.md] [--quick] [FEATURE ...]

DeepSpeed is imported once; each cell is two forks, a process group of their own and a time limit, so that no cell meets
what another one left behind. `DeepSpeed alone` is the measure, without the plugin in the process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.update(
    DS_FP8_DISABLE="1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"
)  # the import hook stays shut: see `_rank`
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import deepspeed  # noqa: E402
import jobs  # noqa: E402
import torch  # noqa: E402
from features import COLUMNS, FEATURES, Feature, configuration  # noqa: E402

LIMIT_S = float(os.environ.get("DS_FP8_SUPPORT_LIMIT_S", "90"))
ALONE, ALIKE = "alone", "as alone"
ONCE = (
    "deepspeed.runtime.zero.stage3 deepspeed.runtime.zero.stage_1_and_2 deepspeed.runtime.bf16_optimizer "
    "deepspeed.runtime.checkpoint_engine ds_fp8.engine.attach ds_fp8.engine.patches ds_fp8.zero.specializing "
    "ds_fp8.zero.private_names ds_fp8.layers ds_fp8.plan.make ds_fp8.config.loading ds_fp8.config.rules "
    "ds_fp8.checkpoint.saving ds_fp8.checkpoint.loading torch._dynamo"
)
"""Modules that most cells need: imported before the forks. Importing is not activating."""


def _rank(rank: int, place: Path, feature: Feature, column: str) -> dict[str, Any]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled; only inference uses it
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    if column != ALONE:
        os.environ.pop("DS_FP8_DISABLE")
        import ds_fp8

        ds_fp8.activate()
    kind, _, name = feature.job.partition(":")
    job = jobs.client_optimizer(getattr(torch.optim, name)) if kind == "client" else getattr(jobs, feature.job)
    from ds_fp8.errors import DsFp8Error

    try:
        losses = job(configuration(feature, column))
    except DsFp8Error as error:
        return {"refused": " ".join(str(error).split())}
    except Exception as error:  # noqa: BLE001 - any failure is a cell of the table
        return {"error": f"{type(error).__name__}: {error}"[:400], "trace": traceback.format_exc()[-1500:]}
    return {"losses": losses, "runs": sorted(set(jobs.NOTED))}


def cell(feature: Feature, column: str) -> dict[str, Any]:
    """What came of one cell: losses of both ranks, or refused, or error."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in (0, 1):
            child = os.fork()
            if child == 0:
                log = os.open(f"{folder}/log{rank}", os.O_CREAT | os.O_WRONLY)
                os.dup2(log, 1), os.dup2(log, 2)
                os.setpgid(0, 0)
                signal.alarm(int(LIMIT_S) + 10)  # ends it where the parent was ended first
                result: dict[str, Any] = {"error": "ended"}
                with contextlib.suppress(BaseException):
                    result = _rank(rank, Path(folder), feature, column)
                    Path(f"{folder}/new{rank}").write_text(json.dumps(result))
                    Path(f"{folder}/new{rank}").replace(f"{folder}/result{rank}")
                os._exit(0)
            children.append(child)
        end = time.monotonic() + LIMIT_S
        waiting = dict(enumerate(children))
        while waiting and time.monotonic() < end:
            for rank, child in list(waiting.items()):
                if os.waitpid(child, os.WNOHANG)[0]:
                    del waiting[rank]
            time.sleep(0.02)
        for child in waiting.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        found = []
        for rank in (0, 1):
            file = Path(f"{folder}/result{rank}")
            log = Path(f"{folder}/log{rank}").read_text(errors="replace")
            lost = {"error": "did not end in time" if rank in waiting else f"died: {log[-300:]}"}
            found.append(json.loads(file.read_text()) if file.exists() else lost)
    for kind in ("error", "refused"):
        if any(kind in one for one in found):
            if kind == "refused" and not all("refused" in one for one in found):
                return {"error": f"refused by one rank only: {found}"[:400]}
            return next(one for one in found if kind in one)
    return {"losses": [one["losses"] for one in found], "runs": found[0]["runs"]}


WANTED = {"fp8": "layers", "O1": "states", "O2": "states", "O3": "states"}


def judge(feature: Feature, column: str, found: dict[str, Any], alone: dict[str, Any]) -> str:
    """`works`, `refused: reason`, or `FAILS: why`."""
    if "refused" in found:
        return f"refused: {re.sub(r'/tmp/[^ :]*/', '', found['refused'])}"
    if (
        "error" in found
        and feature.alone
        and feature.alone in found["error"]
        and feature.alone in alone.get("error", "")
    ):
        return ALIKE
    if "error" in found:
        return f"FAILS: {found['error']}"
    if "losses" not in alone:  # where DeepSpeed alone does not
        ends = column == "absent" or all(WANTED[column] in runs for runs in found["runs"])
        return "works" if ends else f"FAILS: the engine has {found['runs']}"
    ours, theirs = ([loss for rank in one["losses"] for loss in rank] for one in (found, alone))
    if column == "absent":
        return "works" if ours == theirs else "FAILS: losses are not DeepSpeed's to the bit"
    if not all(WANTED[column] in runs for runs in found["runs"]):
        return f"FAILS: the engine has {found['runs']}"
    if ours == theirs:
        return "FAILS: losses equal DeepSpeed's to the bit: nothing was in FP8"
    if not all(map(math.isfinite, ours)):
        return "FAILS: a loss is no number"
    farthest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return "works" if farthest < feature.near else f"FAILS: a loss is {farthest:.2f} from DeepSpeed's"


def expected(feature: Feature, column: str) -> str:
    if column in feature.refused:
        return "refused"
    return ALIKE if feature.alone and column not in feature.runs else "works"


def fill(names: list[str], kept: Path | None = None) -> dict[str, dict[str, str]]:
    """feature -> column -> verdict; with `kept`, rows of earlier calls too, and each new one is written there at
    once.
    """
    for name in ONCE.split():
        importlib.import_module(name)
    from ds_fp8 import kernels

    kernels.path("cpu")  # compiled here, not by every cell
    if any(FEATURES[name].config.get("zero_force_ds_cpu_optimizer") for name in names):
        deepspeed.ops.adam.DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(8))])
    table: dict[str, dict[str, str]] = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
    for name in names:
        feature, began = FEATURES[name], time.monotonic()
        alone = cell(feature, ALONE)
        row = {ALONE: judge_alone(feature, alone)}
        for column in COLUMNS:
            row[column] = judge(feature, column, cell(feature, column), alone)
        table[name] = row
        if kept is not None:
            kept.write_text(json.dumps(table))
        print(
            f"{name} ({time.monotonic() - began:.0f} s)",
            *(f"{c}: {v[:230]}" for c, v in row.items()),
            sep="\n    ",
            flush=True,
        )
    return table


def judge_alone(feature: Feature, found: dict[str, Any]) -> str:
    """`works`, `fails: why` where that is expected, or `FAILS: why`."""
    if "losses" in found:
        return "works" if not feature.alone else "FAILS: it works, and `features.py` says that it does not"
    error = re.sub(r"\d{9,}", "N", found.get("error", str(found))).strip().rstrip(":")
    return f"{'fails' if feature.alone and feature.alone in error else 'FAILS'}: {error}"


def page(table: dict[str, dict[str, str]]) -> str:
    """docs/support.md."""
    import ds_fp8

    lines = [
        "# What works with what",
        "",
        (
            "Written by `python tests/support/run.py --write docs/support.md`; do not edit. The rows stand in "
            "`tests/support/features.py`; a part of"
        ),
        "them is run by every CI run, all of them by `DS_FP8_SUPPORT_ALL=1 python -m pytest tests/support`.",
        "",
        (
            f"ds_fp8 {ds_fp8.__version__}, DeepSpeed {deepspeed.__version__}, torch {torch.__version__}; two "
            "CPU ranks over gloo, a small model, three steps."
        ),
        (
            "*absent*: the plugin without its sections, losses equal to DeepSpeed's to the last bit. *works*: the job "
            "ends, our layers or states are in"
        ),
        (
            "the engine, and its losses lie near DeepSpeed's. *refused*: every rank raises the error below before "
            "training starts, or the resumed job before its load changes anything."
        ),
        (
            "*as alone*: DeepSpeed alone ends in an error here, and the job in the same; the errors stand at the end. "
            "Speed, and what needs a GPU, is not in this table."
        ),
        "",
        f"| | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    notes: list[str] = []
    for name, row in table.items():
        cells = []
        for column in COLUMNS:
            verdict, _, reason = row[column].partition(": ")
            if reason:
                reason = reason.replace("|", "/").replace(str(Path.cwd()), ".")[:300]
                if reason not in notes:
                    notes.append(reason)
                verdict += f" [{notes.index(reason) + 1}]"
            cells.append(verdict)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(notes, 1)), ""]
    waiting = [name for name in FEATURES if name not in table]
    if waiting:
        lines += [
            "Rows that were not run for this page; what is expected of them stands in `tests/support/features.py`:",
            "",
        ]
        lines += [", ".join(waiting) + ".", ""]
    alone = [
        f"- {name}: {row[ALONE].partition(': ')[2][:300]}"
        + f" ({FEATURES[name].because})" * bool(FEATURES[name].because)
        for name, row in table.items()
        if row[ALONE] != "works"
    ]
    if alone:
        lines += ["Where DeepSpeed alone ends in an error on two CPU ranks:", "", *alone, ""]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    target = kept = None
    if arguments[:1] == ["--write"]:
        target, arguments = Path(arguments[1]), arguments[2:]
    if arguments[:1] == ["--keep"]:  # rows of several calls come together in this file
        kept, arguments = Path(arguments[1]), arguments[2:]
    quick, arguments = "--quick" in arguments, [one for one in arguments if one != "--quick"]
    names = arguments or [name for name, feature in FEATURES.items() if feature.quick or not quick]
    found = fill(names, kept)
    table = {name: found[name] for name in FEATURES if name in found}
    if target is not None:
        target.write_text(page(table))
    wrong = unexpected(table)
    print(json.dumps({"table": table, "unexpected": wrong}))
    return int(bool(wrong))


def unexpected(table: dict[str, dict[str, str]]) -> list[str]:
    """Cells that are not what `features.py` says."""
    wrong = []
    for name, row in table.items():
        for column in COLUMNS:
            wanted, found = expected(FEATURES[name], column), row[column]
            words = FEATURES[name].refused.get(column, "")
            if not found.startswith(wanted) or words not in found:
                wrong.append(f"{name}, {column}: {found}, expected {wanted} {words}".rstrip())
        if row[ALONE].startswith("FAILS"):
            wrong.append(f"{name}: DeepSpeed alone {row[ALONE]}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
