"""The launch scripts, run for real against stand-ins for Slurm, MPI, PBS and Kubernetes that note what they are given.

A stand-in `srun` or `mpirun` starts every rank with the variables of the original, so what is tested is the whole way
from the user's line to the environment in which Python starts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
SOURCED = ("preflight.sh", "node_env.sh", "supervise.sh")
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

STAND_INS = {
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
    """A machine with stand-ins only; returns a function that runs a script and gives (code, notes, stderr)."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in STAND_INS.items():
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_syntax_and_form(script):
    """Strict mode, and a head that says what is assumed."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    if script.name not in SOURCED:
        assert "set -euo pipefail" in text
        assert text.startswith("#!/usr/bin/env bash\n# ")
        assert os.access(script, os.X_OK)
    if script.name not in (*SOURCED, "rank_env.sh", "pbs.sh"):
        assert text.rstrip().splitlines()[-1].startswith("run_until_done "), "it ends in one launcher line"
        assert "check_config" in text


def test_slurm_directives():
    text = (LAUNCH / "slurm.sh").read_text()
    assert "#SBATCH --requeue\n" in text
    assert "#SBATCH --signal=B:USR1@240\n" in text


def test_slurm_on_the_login_node_checks_and_submits(cluster):
    code, notes, _ = cluster("slurm.sh", *TRAIN, SBATCH_ARGS="--nodes=4 --time=1:00:00")
    assert code == 0
    assert [who for who, *_ in notes] == ["ds_fp8", "sbatch"]
    (arguments, _) = of(notes, "sbatch")[0]
    assert arguments == ["--export=ALL", "--nodes=4", "--time=1:00:00", str(LAUNCH / "slurm.sh"), *TRAIN]


def test_slurm_starts_every_rank_with_its_variables(cluster):
    code, notes, errors = cluster("slurm.sh", *TRAIN, **SLURM)
    assert code == 0, errors
    assert of(notes, "ds_fp8")[0][0] == ["check", "ds.json"]
    ranks = of(notes, "python")
    assert [arguments for arguments, _ in ranks] == [FULL, FULL]
    environments = [environment for _, environment in ranks]
    (cache,) = (cluster.folder / "ds_fp8-me").iterdir()
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"]) for e in environments] == [("0", "0", "2"), ("1", "1", "2")]
    assert {e["MASTER_ADDR"] for e in environments} == {"node7"}
    assert {e["MASTER_PORT"] for e in environments} == {str(20000 + 4711)}
    assert {e["TRITON_CACHE_DIR"] for e in environments} == {str(cache / "triton")}
    assert (cache / "triton").is_dir() and cache.stat().st_mode & 0o777 == 0o700


def test_slurm_address_and_port_may_be_given(cluster):
    _, notes, _ = cluster("slurm.sh", *TRAIN, **SLURM, MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"]) for _, e in of(notes, "python")} == {("10.0.0.1", "1234")}


def test_slurm_container_serves_check_and_ranks(cluster):
    _, notes, _ = cluster("slurm.sh", *TRAIN, **SLURM, CONTAINER_IMAGE="me/image", CONTAINER_MOUNTS="/data")
    check, doctor, job = (arguments for arguments, _ in of(notes, "srun"))
    wanted = ["--container-image=me/image", "--container-mounts=/data"]
    assert all(word in check and word in doctor and word in job for word in wanted)
    assert check[-3:] == ["ds_fp8", "check", "ds.json"]
    assert doctor[-5:] == ["python", "-m", "ds_fp8.cli.main", "doctor", "ds.json"]


def test_slurm_requeues_before_the_limit_and_waits_for_the_end(cluster):
    """USR1 reaches the batch shell; bash handles it although the launcher runs, and the job goes on until it is done."""
    process = cluster.start("slurm.sh", *TRAIN, **SLURM, LAUNCHER_SLEEPS="2", FORWARD_SIGNAL="TERM")
    wait_for(lambda: len(of(cluster.read(), "python")) == 2)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert of(cluster.read(), "scancel")[0][0] == ["--signal=TERM", "4711"]
    assert of(cluster.read(), "scontrol")[-1][0] == ["requeue", "4711"]


def test_slurm_gives_up_after_enough_restarts(cluster):
    variables = {"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3", "LAUNCHER_SLEEPS": "2"}
    process = cluster.start("slurm.sh", *TRAIN, **SLURM, **variables)
    wait_for(lambda: len(of(cluster.read(), "python")) == 2)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert "not again" in errors
    assert ["requeue", "4711"] not in [arguments for arguments, _ in of(cluster.read(), "scontrol")]


def test_the_launchers_exit_code_is_the_jobs(cluster):
    assert cluster("slurm.sh", *TRAIN, **SLURM, LAUNCHER_CODE="7")[0] == 7


@pytest.mark.parametrize("script", ["slurm.sh", "mpi.sh", "hostfile.sh", "kubernetes.sh"])
def test_a_refused_configuration_starts_nothing(cluster, script):
    code, notes, errors = cluster(script, *TRAIN, CHECK_CODE="1")
    assert code == 2
    assert "nothing was started" in errors
    assert [who for who, *_ in notes] == ["ds_fp8"]


@pytest.mark.parametrize("script", ["slurm.sh", "mpi.sh", "hostfile.sh", "kubernetes.sh"])
def test_a_machine_without_the_plugin_starts_nothing(cluster, script):
    """The Python that will train is asked, on the node, with the job's JSON: a missing door trains in bf16 in silence."""
    job = SLURM if script == "slurm.sh" else {}
    code, notes, errors = cluster(script, *TRAIN, **job, DOCTOR_CODE="1", DOCTOR_ARGS="--other-door")
    assert code == 2
    assert "cannot run ds.json, nothing was started" in errors
    assert [who for who, *_ in notes] == ["ds_fp8", "doctor"]
    assert of(notes, "doctor")[0][0] == ["-m", "ds_fp8.cli.main", "doctor", "ds.json", "--other-door"]
    assert of(cluster(script, *TRAIN, **job, SKIP_CHECK="1")[1], "doctor") == of(notes, "doctor")


@pytest.mark.parametrize("script", ["slurm.sh", "mpi.sh", "hostfile.sh", "kubernetes.sh"])
def test_what_is_missing_is_said(cluster, script):
    assert "which script?" in cluster(script)[2]
    assert "set DS_CONFIG" in cluster(script, *TRAIN, DS_CONFIG="")[2]


def test_the_latest_checkpoint_is_resumed(cluster):
    """The tag stands in DeepSpeed's `latest`; scripts that do not look for themselves get their arguments."""
    checkpoint(cluster.folder / "ckpt", 20)
    variables = {"CHECKPOINT_DIR": "ckpt", "RESUME_ARGS": "--resume_from ckpt"}
    _, notes, errors = cluster("slurm.sh", *TRAIN, **SLURM, **variables)
    assert of(notes, "python")[0][0] == [*FULL, "--resume_from", "ckpt"]
    assert "resuming from ckpt/global_step20" in errors


def test_no_checkpoint_yet_is_a_fresh_start(cluster):
    _, notes, _ = cluster("slurm.sh", *TRAIN, **SLURM, CHECKPOINT_DIR="ckpt", RESUME_ARGS="--resume_from ckpt")
    assert of(notes, "python")[0][0] == FULL


def test_a_latest_that_names_nothing_is_refused(cluster):
    (cluster.folder / "ckpt").mkdir()
    (cluster.folder / "ckpt" / "latest").write_text("global_step20")
    code, notes, errors = cluster("slurm.sh", *TRAIN, **SLURM, CHECKPOINT_DIR="ckpt")
    assert code == 2
    assert "'global_step20', which is not there" in errors
    assert of(notes, "srun") == []


def test_open_mpi(cluster):
    code, notes, errors = cluster("mpi.sh", *TRAIN, HOSTFILE="hosts", RANKS="4", RANKS_PER_NODE="2")
    assert code == 0, errors
    (arguments, _) = of(notes, "mpirun")[0]
    assert arguments[:8] == ["-np", "4", "--map-by", "ppr:2:node", "--bind-to", "none", "--hostfile", "hosts"]
    assert arguments[8:10] == ["-x", "MASTER_ADDR"]
    assert [e["RANK"] for _, e in of(notes, "python")] == ["0", "1"]
    assert {e["MASTER_ADDR"] for _, e in of(notes, "python")} == {"node1"}


def test_mpich(cluster):
    code, notes, errors = cluster(
        "mpi.sh", *TRAIN, RANKS_PER_NODE="2", MPI_VERSION="HYDRA build details", HOSTFILE="hosts"
    )
    assert code == 0, errors
    (arguments, _) = of(notes, "mpirun")[0]
    assert arguments[:6] == ["-n", "2", "-ppn", "2", "-f", "hosts"]
    assert arguments[6] == "-genvlist"
    assert "TRITON_CACHE_DIR" in arguments[7].split(",")
    assert [(e["RANK"], e["LOCAL_RANK"]) for _, e in of(notes, "python")] == [("0", "0"), ("1", "1")]


def test_mpi_on_one_machine_counts_its_gpus(cluster):
    _, notes, _ = cluster("mpi.sh", *TRAIN)
    assert of(notes, "mpirun")[0][0][:2] == ["-np", "2"]


PBS = {"PBS_JOBID": "99.server", "PBS_NODEFILE": "nodes", "LAUNCH_DIR": str(LAUNCH), "TRAIN": " ".join(TRAIN)}


def test_pbs_reads_ranks_and_nodes_from_the_node_file(cluster):
    (cluster.folder / "nodes").write_text("nodeB\nnodeB\nnodeA\nnodeA\n")
    code, notes, errors = cluster("pbs.sh", **PBS, WALLTIME_S="0")
    assert code == 0, errors
    (arguments, _) = of(notes, "mpirun")[0]
    assert arguments[:4] == ["-np", "4", "--map-by", "ppr:2:node"]
    assert {e["MASTER_ADDR"] for _, e in of(notes, "python")} == {"nodeB"}, "the first host is where the script runs"
    assert of(notes, "python")[0][0] == FULL
    assert list(cluster.folder.glob("tmp.*")) == [], "temporary files are gone"


def test_pbs_queues_a_successor_before_the_limit(cluster):
    """The timer fires one second after the start; the successor waits for this job."""
    (cluster.folder / "nodes").write_text("nodeB\n")
    code, notes, errors = cluster("pbs.sh", **PBS, WALLTIME_S="241", LAUNCHER_SLEEPS="3")
    assert code == 0, errors
    (arguments, _) = of(notes, "qsub")[0]
    assert arguments[-3:] == ["-W", "depend=afterany:99.server", str(LAUNCH / "pbs.sh")]


def test_hostfile_uses_deepspeeds_launcher_and_carries_the_caches(cluster):
    code, notes, errors = cluster(
        "hostfile.sh", *TRAIN, HOSTFILE="hosts", MASTER_PORT="1234", DEEPSPEED_ARGS="--num_gpus 2"
    )
    assert code == 0, errors
    (arguments, environment) = of(notes, "deepspeed")[0]
    start = ["--hostfile", "hosts", "--master_addr", "node1", "--master_port", "1234", "--num_gpus", "2"]
    assert arguments == [*start, "--module", "ds_fp8.cli.doctor", "ds.json", "--every-rank", "--within", "300"]
    (arguments, environment) = of(notes, "deepspeed")[1]
    assert arguments == [*start, *FULL[1:]]
    assert environment["DS_ENV_FILE"]
    assert not Path(environment["DS_ENV_FILE"]).exists(), "removed at the end"


def test_kubernetes_uses_the_first_pod_as_rendezvous(cluster):
    code, notes, errors = cluster("kubernetes.sh", *TRAIN, NODES="2", JOB_COMPLETION_INDEX="1", JOB_NAME="job")
    assert code == 0, errors
    (arguments, _) = of(notes, "torchrun")[0]
    assert " ".join(arguments) == (
        "--nnodes 2 --node_rank 1 --nproc_per_node 2 --master_addr job-0.job --master_port 29500 " + " ".join(FULL[1:])
    )


def test_kubernetes_manifest_names_what_the_script_reads():
    text = (LAUNCH / "kubernetes.yaml").read_text()
    assert 'command: ["bash", "/launch/kubernetes.sh", "train.py"' in text
    assert 'command: ["ds_fp8", "check", "/config/ds.json"]' in text
    assert all(name in text for name in ("JOB_NAME", "NODES", "DS_CONFIG", "CHECKPOINT_DIR", "clusterIP: None"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}, ("5", "1", "8")),
        ({"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PMI_SIZE": "8"}, ("5", "1", "8")),
        (
            # mpirun inside a Slurm allocation: Slurm's variables speak of the batch step, MPI's of the rank
            {
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_NTASKS": "1",
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "8",
            },
            ("5", "1", "8"),
        ),
    ],
)
def test_rank_variables_of_each_starter(cluster, variables, expected):
    rank = {"MASTER_ADDR": "x", "MASTER_PORT": "1", **variables}
    code, notes, errors = cluster("rank_env.sh", "python", "train.py", **rank)
    assert code == 0, errors
    (_, environment) = of(notes, "python")[0]
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == expected


def test_a_rank_without_a_number_stops(cluster):
    code, notes, errors = cluster("rank_env.sh", "python", MASTER_ADDR="x", MASTER_PORT="1")
    assert (code, notes) == (2, [])
    assert "no rank variable" in errors


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
