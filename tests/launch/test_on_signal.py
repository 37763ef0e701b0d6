"""A script that never saves loses at most one step: real launchers, two ranks, a signal, and the same losses as
without it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.journeys.launching import PACKAGE_PARENT, command_of, environment, free_port, hook_folder

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("train_signalled.py")
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "steps_per_print": 1000000,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "fp8": {"enabled": True, "amax_history_len": 4, "checkpoint_on_signal": "$CHECKPOINTS"},
    "msamp": {"enabled": True, "opt_level": "O2"},
}
BASELINE = {key: value for key, value in CONFIG.items() if key not in ("fp8", "msamp")}
BASELINE["optimizer"] = {
    "type": "AdamW",
    "params": {"lr": 1e-2, "torch_adam": True},
}  # DeepSpeed's own would be compiled


class Job:
    """A launcher with its ranks, and what they have said so far."""

    def __init__(self, folder: Path, name: str, command: list[str], **variables: str):
        self.log = folder / f"{name}.log"
        path = f"{hook_folder(folder / 'import_hook')}:{PACKAGE_PARENT}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(**{"PYTHONPATH": path, "CHECKPOINTS": str(folder / "ckpt"), **variables}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self.log.read_text()

    def losses(self) -> dict[tuple[int, int], str]:
        """(rank, step) -> the loss to its last digit."""
        lines = [line.split() for line in self.said().splitlines() if line.startswith("STEP ")]
        return {(int(rank), int(step)): loss for _, rank, step, loss in lines}

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that train, by rank; their data loaders' workers are not meant."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                own, parent = process.environ().get("RANK"), process.parent()
                if own is not None and parent is not None and parent.environ().get("RANK") is None:
                    found[int(own)] = process
            except psutil.Error:
                continue
        return found

    def until(self, wanted, limit_s: float = 180) -> None:
        end = time.monotonic() + limit_s
        while not wanted(self):
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.05)

    def end(self, limit_s: float = 240) -> int:
        try:
            return self.process.wait(limit_s)
        finally:
            if self.process.poll() is None:
                for process in psutil.Process(self.process.pid).children(recursive=True):
                    process.kill()
                self.process.kill()


def deepspeed(folder: Path, name: str, **variables: str) -> Job:
    start = [command_of("deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()), str(SCRIPT)]
    return Job(folder, name, [*start, "--deepspeed_config", "ds.json"], **variables)


def torchrun(folder: Path, name: str, **variables: str) -> Job:
    start = [command_of("torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), str(SCRIPT)]
    return Job(folder, name, [*start, "--deepspeed_config", "ds.json"], **variables)


def test_one_rank_is_signalled_and_all_save_the_same_step(tmp_path):
    """USR1 to rank 1 alone, by the JSON key: both ranks leave with 138, nothing is computed twice, the losses go on."""
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    whole = deepspeed(tmp_path, "whole", STEPS="40", CHECKPOINTS=str(tmp_path / "nowhere"))
    assert whole.end() == 0, whole.said()
    first = deepspeed(tmp_path, "first", STEPS="40", STEP_S=".2", DATA_WORKERS="1")
    first.until(lambda job: (1, 3) in job.losses())
    first.ranks()[1].send_signal(signal.SIGUSR1)
    assert first.end() == 128 + signal.SIGUSR1, first.said()
    assert "SIGUSR1: saved step" in first.said()
    second = deepspeed(tmp_path, "second", STEPS="40")
    assert second.end() == 0, second.said()
    done = {rank: [step for other, step in first.losses() if other == rank] for rank in (0, 1)}
    assert done[0] == done[1] and len(done[0]) < 40, "all ranks stopped after the same step"
    assert first.losses() | second.losses() == whole.losses()
    assert not first.losses().keys() & second.losses().keys(), "nothing is lost, nothing is computed twice"


@pytest.mark.parametrize("launcher", [deepspeed, torchrun], ids=["deepspeed", "torchrun"])
def test_term_to_the_launcher_of_an_unmodified_engine(tmp_path, launcher):
    """By the public function, without any section of ours: TERM to the launcher reaches the ranks, and they save."""
    (tmp_path / "ds.json").write_text(json.dumps(BASELINE))
    job = launcher(tmp_path, "first", STEPS="4000", STEP_S=".1", CALL="1")
    job.until(lambda job: (0, 2) in job.losses() and (1, 2) in job.losses())
    target = job.process if launcher is torchrun else psutil.Process(job.process.pid).children()[0]
    target.send_signal(signal.SIGTERM)  # the `deepspeed` command itself passes nothing on: its child does
    assert job.end() != 0
    last = max(step for _, step in job.losses())
    assert (tmp_path / "ckpt" / "latest").read_text() == f"global_step{last + 1}", job.said()
    assert {(0, last), (1, last)} <= job.losses().keys()


def test_the_function_refuses_what_it_cannot_do(tmp_path):
    """Twice the same folder, another thread, a variable that is not set: named, with the way out."""
    code = """
import threading, torch, deepspeed, ds_fp8
from ds_fp8.errors import CheckpointError
adamw = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": adamw}
def engine():
    model = torch.nn.Linear(4, 4)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=dict(config))[0]
def refused(*args):
    try:
        ds_fp8.checkpoint_on_signal(*args)
    except CheckpointError as error:
        print("REFUSED", str(error).replace(chr(10), " "))
a, b = engine(), engine()
import signal
mine = signal.getsignal(signal.SIGUSR1)
armed = ds_fp8.checkpoint_on_signal(a, "ckpt")
refused(a, "other"); refused(b, "ckpt"); refused(b, "$NOT_SET/x")
thread = threading.Thread(target=refused, args=(b, "other")); thread.start(); thread.join()
armed.disarm()
assert signal.getsignal(signal.SIGUSR1) == mine and "step" not in a.__dict__ or a.step.__func__ is type(a).step
ds_fp8.checkpoint_on_signal(b, "ckpt")
import os
os.kill(os.getpid(), signal.SIGTERM)
b.backward(b(torch.ones(1, 4)).sum()); b.step()
print("not reached")
"""
    script = tmp_path / "refuse.py"
    script.write_text(code)
    path = f"{hook_folder(tmp_path / 'import_hook')}:{PACKAGE_PARENT}"
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment(PYTHONPATH=path) | variables | {"MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=240,
    )
    refused = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(refused) == 4, done.stdout + done.stderr
    assert "armed already" in refused[0] and "armed already" in refused[1]
    assert "$NOT_SET/x" in refused[2] and "main thread" in refused[3]
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert (tmp_path / "ckpt" / "latest").read_text() == "global_step1"
    assert (tmp_path / "ckpt" / "global_step1").is_dir()
