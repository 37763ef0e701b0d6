"""Parity: GPTs of GPT-2's size (124M, context 1024) on 40M tokens of real text, in bf16 and in every FP8 configuration.

    python3 benchmarks/gpu/measure_parity.py --out parity.json --archive corpus.xz --tokenizer tokenizer.json \\
        --seconds 540
    python3 benchmarks/gpu/measure_parity.py --tiny --out parity.json          # a rehearsal in half a minute on a CPU

Runs come in the order of their value; those that are done in `--out` or in a file given by `--resume` are not run
again, so the list is worked off in pieces. A run lives within one piece. What cannot end in time is not started; a run
that is cut off leaves its curve so far. A run takes one GPU, or as many as stand behind its name (`--only
"pretrain/O3/1@2"`): the gradients' wire does nothing on one rank. Several runs share a GPU, because the host is the
slower one of the two at this size. `parity_report.py` makes the page of the results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import parity_corpus
import torch

HERE = Path(__file__).resolve().parent

FP8 = {"enabled": True, "backend": "torch"}
WIRE = {"gradient_wire": "e4m3", "gradient_wire_scope": "all"}
"""Asked for: over NVLink the automatic choice leaves gradients to NCCL."""


def level(name: str, **keys: Any) -> dict[str, Any]:
    return {"fp8": FP8 | {"recipe": "delayed"}, "msamp": {"enabled": True, "opt_level": name} | WIRE | keys}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16 again": {},
    "delayed": {"fp8": FP8 | {"recipe": "delayed"}},
    "O2": level("O2"),
    "O3": level("O3"),
    "block": {"fp8": FP8 | {"recipe": "block"}},
    "current": {"fp8": FP8 | {"recipe": "current"}},
    "O1": level("O1"),
    "O3 expanded": level("O3", exp_avg="e4m3_expanded", exp_avg_sq="e4m3_expanded"),
    "O2 fp16 master": level("O2", master="fp16"),
    "O2 fp16 master, nearest": level("O2", master="fp16", rounding="nearest"),
}
SEED_1 = ["bf16", "delayed", "O2", "O3", "block", "current", "O1", "O3 expanded"]
AGAIN = ["bf16", "delayed", "O2", "O3", "block", "current", "O3 expanded"]
ADAPTED = ["bf16", "delayed", "O2", "O3"]

SIZE = {"depth": 12, "width": 768, "head_size": 64, "context": 1024, "stage": 2, "compile": True}
PRETRAIN = {"kind": "pretrain", "sequences": 32, "steps": 1220, "warmup": 100, "lr": 6e-4, "tail": 80, "tail_lr": 1e-6}
PRETRAIN |= {"eval_every": 122, "eval_sequences": 512}
TUNE = {"kind": "tune", "sequences": 8, "steps": 240, "warmup": 20, "lr": 5e-5, "tail": 0, "tail_lr": 0.0}
TUNE |= {"eval_every": 60, "eval_sequences": 64}
LORA = TUNE | {"kind": "lora", "lr": 5e-4}
TINY_SIZE = {"depth": 2, "width": 64, "head_size": 16, "context": 64, "stage": 2, "compile": False}
TINY = {"sequences": 4, "steps": 8, "warmup": 2, "tail": 2, "eval_every": 4, "eval_sequences": 8}


def jobs(options: argparse.Namespace, vocabulary: int) -> dict[str, dict[str, Any]]:
    """Name -> job, the most valuable first. Fine-tuning starts from the first bf16 run of this piece."""
    found: dict[str, dict[str, Any]] = {}
    size = (TINY_SIZE if options.tiny else SIZE) | {"vocabulary": vocabulary, "data": str(options.data)}

    def add(name: str, seed: int, schedule: dict[str, Any]) -> None:
        kind = schedule["kind"]
        job = size | schedule | (TINY if options.tiny else {}) | {"seed": seed, "sections": CONFIGURATIONS[name]}
        if options.compile:
            job["compile"] = True
        if options.steps:
            job["steps"] = options.steps
        found[f"{kind}/{name}/{seed}"] = job

    def adapt(seed: int) -> None:
        for schedule in (TUNE, LORA):
            for name in ADAPTED[: -1 if schedule is LORA else None]:  # O3 refuses LoRA: no frozen weight is sent
                add(name, seed, schedule)

    for name in SEED_1:
        add(name, 1, PRETRAIN)
    add("bf16", 2, PRETRAIN)
    add("delayed", 2, PRETRAIN)
    adapt(1)
    for name in AGAIN[2:]:
        add(name, 2, PRETRAIN)
    for name in ("O2 fp16 master", "O2 fp16 master, nearest"):
        add(name, 1, PRETRAIN)
    for name in AGAIN:
        add(name, 3, PRETRAIN)
    adapt(2)
    adapt(3)
    wanted = options.only.split(";") if options.only else list(found)
    for name in wanted:  # any other seed
        kind, configuration, seed = name.partition("@")[0].split("/")
        add(configuration, int(seed), {"pretrain": PRETRAIN, "tune": TUNE, "lora": LORA}[kind])
    return {name: found[name.partition("@")[0]] | {"ranks": int(name.partition("@")[2] or 1)} for name in wanted}


def visible_gpus() -> list[str]:
    """Their names as CUDA_VISIBLE_DEVICES has them."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(at) for at in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def tokens_of(job: dict[str, Any]) -> int:
    return (job["steps"] + job["tail"]) * job["sequences"] * job["context"]


class Run:
    """One job in its own processes, one for each of `gpus`."""

    def __init__(self, name: str, job: dict[str, Any], gpus: list[str], place: Path):
        self.name, self.gpus, self.start = name, gpus, time.monotonic()
        stem = place / name.replace("/", "_").replace(" ", "_").replace(",", "")
        shutil.rmtree(stem, ignore_errors=True)  # telemetry is appended to what lies there
        self.out, self.log = stem.with_suffix(".json"), stem.with_suffix(".log")
        self.job = job | {"out": str(self.out), "telemetry": str(stem)}
        ranks = len(gpus)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, str(HERE / "parity_job.py"), json.dumps(self.job)]
        environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(place / "inductor"), OMP_NUM_THREADS="1")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        self.out.unlink(missing_ok=True)
        environment.setdefault("NCCL_NVLS_ENABLE", "0")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def found(self) -> dict[str, Any]:
        return json.loads(self.out.read_text()) if self.out.exists() else {"state": "started"}

    def remaining(self) -> float:
        """Tokens that it has yet to see."""
        return (1 - self.found().get("step", 0) / (self.job["steps"] + self.job["tail"])) * tokens_of(self.job)

    def end(self) -> dict[str, Any]:
        """What it found; with the end of its log, if it did not come to its end."""
        ended = self.process.poll() is None
        if ended:
            self.process.terminate()  # torchrun ends its ranks, which are in sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        found = self.found()
        if found["state"] != "done":
            found |= {"state": "cut off" if ended else "failed"}
            found["log"] = self.log.read_text(errors="replace")[-3000:]
        return found | {"seconds": round(time.monotonic() - self.start, 1)}


class Piece:
    """Works off jobs on the GPUs until they are done or the time is over."""

    def __init__(self, options: argparse.Namespace, done: dict[str, Any], begin: float):
        self.options, self.results, self.deadline = options, done, begin + options.seconds
        self.gpus = visible_gpus() or ["cpu"] * 2
        self.running: list[Run] = []
        self.base = options.data / "base.pt"
        self.base.unlink(missing_ok=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def room(self, ranks: int) -> list[str]:
        """The `ranks` GPUs with the fewest runs; none where one of them is full."""
        load = {gpu: sum(gpu in run.gpus for run in self.running) for gpu in self.gpus}
        found = sorted(self.gpus, key=lambda gpu: load[gpu])[:ranks]
        return found if len(found) == ranks and all(load[gpu] < self.options.at_once for gpu in found) else []

    def needs(self, job: dict[str, Any], gpus: list[str]) -> float:
        """Seconds until it has ended beside those that run on `gpus`."""
        shared = sum(run.remaining() / len(run.gpus) for run in self.running if gpus[0] in run.gpus)
        device = (shared + tokens_of(job) / len(gpus)) / self.options.tokens_per_s
        host = (job["steps"] + job["tail"]) * self.options.step_seconds
        return self.options.start_seconds + max(device, host)

    def next(self, waiting: dict[str, dict[str, Any]]) -> tuple[str, list[str]] | None:
        """The first job that has room and is likely to end in time, and its GPUs."""
        for name, job in waiting.items():
            gpus = self.room(job["ranks"])
            if job["kind"] != "pretrain" and not self.base.exists():
                continue
            if gpus and self.needs(job, gpus) < self.left():
                return name, gpus
        return None

    def collect(self, run: Run) -> None:
        found = run.end()
        self.results[run.name] = found
        if found["state"] == "done":
            loss, speed = found["evals"][-1][1], found["tokens per s"]
            print(f"[parity] {run.name}: {loss} {speed} tokens/s {found['seconds']} s", flush=True)
        else:
            print(f"[parity] {run.name}: {found['state']} {found.get('log', '')[-1500:]}", flush=True)
        self.options.out.write_text(json.dumps(self.results))

    def work(self, waiting: dict[str, dict[str, Any]]) -> None:
        while self.left() > 0 and (waiting or self.running):
            for run in [run for run in self.running if run.process.poll() is not None]:
                self.running.remove(run)
                self.collect(run)
            found = self.next(waiting)
            if found is not None:
                name, gpus = found
                job = waiting.pop(name)
                job |= {"base": str(self.base)} if job["kind"] != "pretrain" else {}
                job |= {"save": str(self.base)} if job["kind"] == "pretrain" and not job["sections"] else {}
                self.running.append(Run(name.partition("@")[0], job, gpus, self.options.data))
            elif not self.running:
                break
            time.sleep(0.2)
        for run in self.running:
            self.collect(run)


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON of all results")
    parser.add_argument("--resume", type=Path, action="append", default=[], help="results of earlier pieces")
    parser.add_argument("--data", type=Path, default=Path("/tmp/ds_fp8_parity"), help="folder for what does not stay")
    parser.add_argument("--archive", type=Path, help="carried text, see parity_corpus.py")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of the package tokenizers; else bytes")
    parser.add_argument("--own-bytes", type=float, default=150e6, help="text from each root of this machine")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--start-seconds", type=float, default=40, help="a run's start and compilation")
    parser.add_argument("--at-once", type=int, default=2, help="runs that share a GPU")
    parser.add_argument("--tokens-per-s", type=float, default=380e3, help="of one GPU, for all its runs")
    parser.add_argument("--step-seconds", type=float, default=0.1, help="least time of a step, by the host")
    parser.add_argument("--only", help="names of runs, separated by semicolons, in this order")
    parser.add_argument("--steps", type=int, default=0, help="other number of steps")
    parser.add_argument("--compile", action="store_true", help="with --tiny: compile the blocks too")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.own_bytes, options.start_seconds, options.at_once = 2e6, 5, 1
    corpus = parity_corpus.prepare(options.data, options.archive, options.tokenizer, int(options.own_bytes))
    print(f"[parity] corpus {corpus}, {time.monotonic() - begin:.0f} s", flush=True)
    results: dict[str, Any] = {}
    for path in [*options.resume, options.out]:
        if path.exists():
            results |= {name: run for name, run in json.loads(path.read_text()).items() if run.get("state") == "done"}
    results.pop("corpus", None)
    listed = jobs(options, corpus["vocabulary"])
    waiting = {name: job for name, job in listed.items() if name.partition("@")[0] not in results}
    piece = Piece(options, results, begin)
    print(f"[parity] GPUs {piece.gpus}", flush=True)
    piece.work(waiting)
    results["corpus"] = corpus
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results["machine"] = {"device": device, "torch": torch.__version__, "seconds": round(time.monotonic() - begin)}
    options.out.write_text(json.dumps(results))
    print(f"[parity] {sum(run.get('state') == 'done' for run in results.values())} runs are done", flush=True)


if __name__ == "__main__":
    main()
