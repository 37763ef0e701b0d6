"""Fakes of Slurm, MPI, PBS and the launchers that note what they are given, and start every rank with the original's
variables.

What they show is the whole way from the user's line to the environment in which Python starts. They do not show that
the originals behave so: `test_slurm.py` and `test_mpi.py` run those.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
READ = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_CACHE_DIR", "DS_ENV_FILE", "NOTED")

NOTE = f"""#!{sys.executable}
import json, os, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["NOTES"], "a") as file:
    file.write(json.dumps([name, sys.argv[1:], {{k: os.environ.get(k) for k in {READ!r}}}]) + "\\n")
"""
SCONTROL = NOTE + "if sys.argv[1:3] == ['show', 'hostnames']: print('node7\\nnode8')\n"
CHECK = (
    "#!" + sys.executable + "\nimport sys\nif sys.argv[1] == 'latest':\n"
    "    from ds_fp8.cli.main import main\n    sys.exit(main())\n"
    + NOTE.split("\n", 1)[1]
    + "sys.exit(int(os.environ.get('CHECK_CODE', 0)))\n"
)
PYTHON = (
    NOTE.replace("with open", "name = 'doctor' if sys.argv[1:3] == ['-m', 'ds_fp8.cli.main'] else name\nwith open", 1)
    + "sys.exit(int(os.environ.get('DOCTOR_CODE', 0)) if name == 'doctor' else 0)\n"
)
SRUN = (
    NOTE
    + """
import subprocess
words = sys.argv[1:]
if 'bash' in words:
    command = words[words.index('bash'):]
    for rank in range(2):
        env = dict(os.environ, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NTASKS='2')
        subprocess.run(command, env=env, check=True)
    subprocess.run(['sleep', os.environ.get('LAUNCHER_SLEEPS', '0')])
    sys.exit(int(os.environ.get('LAUNCHER_CODE', 0)))
"""
)
MPIRUN = """
import subprocess
if sys.argv[1:] == ['--version']:
    print(os.environ['MPI_VERSION'])
    sys.exit()
words = sys.argv[1:]
command = words[words.index('bash'):]
names = ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_COMM_WORLD_SIZE')
if 'Open MPI' not in os.environ['MPI_VERSION']:
    names = ('PMI_RANK', 'MPI_LOCALRANKID', 'PMI_SIZE')
for rank in range(2):
    subprocess.run(command, env=dict(os.environ, **dict(zip(names, (str(rank), str(rank % 2), '2')))), check=True)
subprocess.run(['sleep', os.environ.get('LAUNCHER_SLEEPS', '0')])
"""
MPIRUN = (
    NOTE.replace("with open", "if sys.argv[1:] != ['--version']:\n  with open").replace("    file", "      file")
    + MPIRUN
)

FAKES = {
    "scontrol": SCONTROL,
    "scancel": NOTE,
    "sbatch": NOTE,
    "qsub": NOTE,
    "srun": SRUN,
    "mpirun": MPIRUN,
    "deepspeed": NOTE,
    "torchrun": NOTE,
    "ds_fp8": CHECK,
    "python": PYTHON,
    "nvidia-smi": "#!/bin/sh\nprintf 'GPU 0\\nGPU 1\\n'\n",
}


@pytest.fixture
def cluster(tmp_path):
    """A machine with fakes only; returns a function that runs a script and gives (code, notes, stderr)."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in FAKES.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    (tmp_path / "ds.json").write_text("{}")
    (tmp_path / "hosts").write_text("# two nodes\nnode1 slots=2\nnode2 slots=2\n")
    notes = tmp_path / "notes"

    def environment(**variables):
        return {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "USER": "me",
            "NOTES": str(notes),
            "DS_CONFIG": "ds.json",
            "MPI_VERSION": "mpirun (Open MPI) 5.0.3",
            **variables,
        }

    def start(script, *arguments, **variables):
        return subprocess.Popen(
            ["bash", str(LAUNCH / script), *arguments],
            cwd=tmp_path,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read():
        return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []

    def run(script, *arguments, **variables):
        process = start(script, *arguments, **variables)
        _, errors = process.communicate(timeout=60)
        return process.returncode, read(), errors

    run.start, run.read, run.folder = start, read, tmp_path
    return run


def checkpoint(folder, step, complete=True):
    """A tag that `latest` names, complete by its manifest."""
    tag = folder / f"global_step{step}"
    tag.mkdir(parents=True)
    files = {} if complete else {"mp_rank_00_model_states.pt": {"bytes": 7}}
    (tag / "ds_fp8_manifest.json").write_text(json.dumps({"version": 1, "step": step, "files": files}))
    (folder / "latest").write_text(tag.name)


def of(notes, name):
    return [(arguments, environment) for who, arguments, environment in notes if who == name]


SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": "/nowhere"}
TRAIN = ("train.py", "--epochs", "3")
FULL = ["-u", *TRAIN, "--deepspeed_config", "ds.json"]
PBS = {"PBS_JOBID": "99.server", "PBS_NODEFILE": "nodes", "LAUNCH_DIR": str(LAUNCH), "TRAIN": " ".join(TRAIN)}


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
