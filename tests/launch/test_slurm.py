"""launch/slurm.sh under a real Slurm with two nodes: submit, typo, signal, crash, node death, silence, resume, exit
codes.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.machines import LAUNCH, RANK, kill, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.dist, pytest.mark.timeout(400)]

CONFIG = {"train_micro_batch_size_per_gpu": 1, "fp8": {"enabled": True, "checkpoint_on_signal": "$CHECKPOINT_DIR"}}
QUICK = {"SKIP_CHECK": "1"}


@pytest.fixture
def job(slurm, tmp_path):
    """Submit one; the folder has a configuration. Gives (submit, slurm, folder)."""
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))

    def submit(*arguments, **variables):
        done = slurm.submit(tmp_path, *arguments, **{**QUICK, "CHECKPOINT_DIR": "ckpt", **variables})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.split()[-1]

    submit.slurm, submit.folder = slurm, tmp_path
    return submit


def log(job, number):
    file = job.folder / f"ds_fp8-{number}.log"
    return file.read_text() if file.exists() else ""


def report(job, rank, begin=0):
    return json.loads((job.folder / f"report_{rank}_{begin}.json").read_text())


def test_submit_from_another_folder_and_what_the_ranks_get(job):
    """Two nodes; direct sbatch from a folder without launch/; the environment, the logs, the port."""
    environment = {
        **job.slurm.environment,
        **QUICK,
        "DS_CONFIG": "ds.json",
        "NCCL_DEBUG": "WARN",
        "CHECKPOINT_DIR": "ckpt",
    }
    command = [
        "sbatch",
        "--gpus-per-node=0",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--cpus-per-task=2",
        str(LAUNCH / "slurm.sh"),
    ]
    done = subprocess.run(
        [*command, str(RANK), "--epochs", "3"], cwd=job.folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    number = done.stdout.split()[-1]
    assert job.slurm.until_over(number) == ("COMPLETED", 0), log(job, number)
    reports = [report(job, rank) for rank in range(4)]
    assert [each["node"] for each in reports] == ["n1", "n1", "n2", "n2"]
    assert all(each["args"] == ["--epochs", "3", "--deepspeed_config", "ds.json"] for each in reports)
    for rank, each in enumerate(reports):
        found = each["env"]
        assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == (str(rank), str(rank % 2), "4")
        assert found["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(found["MASTER_PORT"]) < 32768
        assert (found["NCCL_DEBUG"], found["OMP_NUM_THREADS"], found["PYTHONFAULTHANDLER"]) == ("WARN", "1", "1")
        assert found["SLURM_CPUS_PER_TASK"] == "2"
        assert Path(found["TRITON_CACHE_DIR"]).is_dir()
    whole = log(job, number)
    assert "DONE 0" in whole and "DONE 1" not in whole, "rank 0 writes to the job's log, the others to their own"
    assert "DONE 3" in (job.folder / "logs" / f"ds_fp8-{number}" / "rank_3.log").read_text()


def test_a_typo_costs_no_node(job):
    (job.folder / "ds.json").write_text(json.dumps({"fp8": {"enabled": True, "margn": 1}}))
    done = job.slurm.submit(job.folder)
    assert done.returncode == 2
    assert "did you mean 'margin'" in done.stdout + done.stderr
    assert "Submitted" not in done.stdout


def test_the_warning_saves_requeues_and_resumes(job):
    """USR1 to the batch shell, as Slurm sends it before the limit: the ranks save, leave, and the job comes back."""
    number = job(STEPS="60", STEP_S="0.2")
    wait_for(lambda: "STEP 0 3" in log(job, number), 60, job.slurm.logs)
    job.slurm._run("scancel", "--batch", "--signal=USR1", number)
    wait_for(lambda: job.slurm.show(number)["Restarts"] == "1", 90, lambda: log(job, number))
    first = log(job, number)
    saved = next(int(line.split()[2]) for line in first.splitlines() if line.startswith("SAVED 0"))
    assert (job.folder / "ckpt" / "latest").read_text() == f"global_step{saved}"
    assert job.slurm.until_over(number) == ("COMPLETED", 0), log(job, number)
    whole = log(job, number)
    assert f"resuming from ckpt/global_step{saved}" in whole
    assert [line for line in whole.splitlines() if line.startswith("STEP 0")] == [f"STEP 0 {n}" for n in range(60)]


def test_scancel_is_no_preemption(job):
    """A cancelled job stays cancelled, and nothing of it is left."""
    number = job(STEPS="6000", STEP_S="0.2")
    wait_for(lambda: "STEP 0 1" in log(job, number), 60, job.slurm.logs)
    pid = int(next(line for line in log(job, number).splitlines() if line.startswith("BEGIN 0")).split()[-1])
    job.slurm._run("scancel", number)
    state, _ = job.slurm.until_over(number)
    assert state == "CANCELLED"
    wait_for(lambda: not psutil.pid_exists(pid))
    time.sleep(3)
    assert job.slurm.show(number)["JobState"] == "CANCELLED"


def test_a_preempted_job_saves_and_comes_back(job):
    """A partition of higher priority wants the nodes: Slurm sends TERM to the ranks and grants a grace time."""
    number = job(STEPS="40", STEP_S="0.2", SAVES_ON="SIGTERM")
    wait_for(lambda: "STEP 0 3" in log(job, number), 60, job.slurm.logs)
    urgent = job.slurm._run(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    wait_for(lambda: job.slurm.show(number)["Restarts"] == "1", 90, lambda: log(job, number))
    assert job.slurm.until_over(urgent.split()[-1]) == ("COMPLETED", 0)
    assert job.slurm.until_over(number) == ("COMPLETED", 0), log(job, number)
    whole = log(job, number)
    assert "SAVED 0" in whole and "resuming from ckpt/global_step" in whole, whole
    assert [line for line in whole.splitlines() if line.startswith("STEP 0")] == [f"STEP 0 {n}" for n in range(40)]


def test_a_crash_is_tried_again_and_its_code_is_the_jobs(job):
    """Rank 1 ends with 7 where it ended before: two starts, then the job ends with 7, not with the others' 143."""
    number = job(STEPS="20", SAVE_EVERY="2", DIE="1 5 7")
    assert job.slurm.until_over(number) == ("FAILED", 7), log(job, number)
    whole = log(job, number)
    assert whole.count("launch: it ended with exit code 7; start 2 of 4, from global_step4") == 1
    assert "with exit code 7 again, with no checkpoint since global_step4: not tried again" in whole
    assert "from rank 1" in whole and "DYING 1 5" in whole, "the end of the failed rank's own log"


def test_a_crash_that_passes(job):
    number = job(STEPS="12", STEP_S="0.1", SAVE_EVERY="2", DIE="1 5 KILL", ONCE="1")
    assert job.slurm.until_over(number) == ("COMPLETED", 0), log(job, number)
    assert "resuming from ckpt/global_step4" in log(job, number)


def test_wrong_arguments_are_not_tried_again(job):
    number = job(DIE="0 0 2")
    assert job.slurm.until_over(number) == ("FAILED", 2), log(job, number)
    assert "start 2" not in log(job, number)


def test_silence_ends_with_stacks(job):
    """Nobody writes for HANG_S seconds: every rank shows where it is, and the job ends, or begins anew."""
    number = job(STEPS="8", HANG="1 3", SAVE_EVERY="1", HANG_S="4", ONCE="1", STEP_S="0.3")
    wait_for(lambda: "nothing written for 4 s" in log(job, number), 90, lambda: log(job, number))
    assert job.slurm.until_over(number)[0] == "COMPLETED", log(job, number)
    assert "Fatal Python error: Aborted" in (job.folder / "logs" / f"ds_fp8-{number}" / "rank_1.log").read_text()


@pytest.mark.slow
def test_a_dead_node(job):
    """slurmd and everything on n2 die: Slurm requeues, and when the node is back the job goes on."""
    number = job(STEPS="100", STEP_S="0.2", SAVE_EVERY="1")
    wait_for(lambda: "STEP 0 3" in log(job, number), 60, job.slurm.logs)
    daemon = psutil.Process(job.slurm.pid("slurmd-n2"))
    victims = [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("SLURMD_NODENAME") == "n2"]
    for process in [daemon, *victims]:
        kill(process.pid)
    wait_for(
        lambda: (
            int(job.slurm.show(number)["Restarts"]) >= 1
            or job.slurm.show(number)["JobState"] in ("NODE_FAIL", "FAILED")
        ),
        120,
        lambda: log(job, number),
    )
    job.slurm.start_node("n2")
    assert job.slurm.until_over(number, 200)[0] == "COMPLETED", log(job, number)
    assert "resuming from ckpt/global_step" in log(job, number)


def test_a_limit_below_the_warning_is_refused(job):
    number = job(SBATCH_ARGS="--nodes=1 --ntasks-per-node=1 --time=4")
    assert job.slurm.until_over(number) == ("FAILED", 2)
    assert "raise --time" in log(job, number)


def test_array_tasks_have_checkpoints_of_their_own(job):
    shared = job(SBATCH_ARGS="--nodes=1 --ntasks-per-node=1 --array=0-1 --output=array-%a.log")
    job.slurm.until_over(f"{shared}_1")
    assert "write ckpt/%a" in (job.folder / "array-1.log").read_text()
    own = job(SBATCH_ARGS="--nodes=1 --ntasks-per-node=1 --array=0-1", CHECKPOINT_DIR="ckpt/%a", SAVE_EVERY="3")
    for task in (0, 1):
        assert job.slurm.until_over(f"{own}_{task}") == ("COMPLETED", 0)
        assert (job.folder / "ckpt" / str(task) / "latest").read_text() == "global_step3"


def test_a_heterogeneous_job_is_refused(job):
    environment = {**job.slurm.environment, **QUICK, "DS_CONFIG": "ds.json"}
    part = ["--gpus-per-node=0", "--nodes=1", "--ntasks-per-node=1"]
    command = ["sbatch", *part, ":", *part, str(LAUNCH / "slurm.sh"), str(RANK)]
    done = subprocess.run(command, cwd=job.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = done.stdout.split()[-1]
    assert job.slurm.until_over(number) == ("FAILED", 2)
    assert "heterogeneous" in log(job, number)


def test_the_plugin_shut_out_on_the_second_node(job):
    """One doctor for each node, before anything is started; the report names the node."""
    python = job.folder / "python_of_the_node"
    python.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] && export DS_FP8_DISABLE=1\nexec python "$@"\n')
    python.chmod(0o755)
    number = job(SKIP_CHECK="0", PYTHON=str(python), CARRY="")
    assert job.slurm.until_over(number, 200) == ("FAILED", 2), log(job, number)
    said = log(job, number)
    assert "FAIL: n2: activation hook: DS_FP8_DISABLE=1: disabled" in said and "nothing was started" in said
    assert not list(job.folder.glob("report_*"))
