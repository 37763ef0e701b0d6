"""The launch scripts, run for real against fakes of Slurm, MPI and Kubernetes (`fakes.py`): what reaches each rank."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.fakes import FULL, LAUNCH, SLURM, TRAIN, checkpoint, of, wait_for

SCRIPTS = sorted(LAUNCH.glob("*.sh"))
SOURCED = ("preflight.sh", "node_env.sh", "supervise.sh")


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
    """USR1 reaches the batch shell; bash handles it although the launcher runs, and the job goes on until it is
    done.
    """
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
    """The Python that will train is asked, on the node, with the job's JSON: a missing activation hook trains in bf16
    in silence.
    """
    job = SLURM if script == "slurm.sh" else {}
    code, notes, errors = cluster(script, *TRAIN, **job, DOCTOR_CODE="1", DOCTOR_ARGS="--other-activation")
    assert code == 2
    assert "cannot run ds.json, nothing was started" in errors
    assert [who for who, *_ in notes] == ["ds_fp8", "doctor"]
    assert of(notes, "doctor")[0][0] == ["-m", "ds_fp8.cli.main", "doctor", "ds.json", "--other-activation"]
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


def test_kubernetes_validates_the_manifest():
    """1.29 is the oldest that takes the rule for disrupted pods."""
    validator = pytest.importorskip("kubernetes_validate")
    import yaml

    for version in ("1.29", "1.31"):
        for document in yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()):
            validator.validate(document, version, strict=True)


def test_kubernetes_gives_the_ranks_the_pods_grace(cluster):
    """TERM reaches this shell alone: the ranks get USR1 from it, torchrun nothing, and the exit code says
    interrupted.
    """
    (cluster.folder / "bin" / "torchrun").write_text(
        "#!/bin/bash\ntrap 'echo TORCHRUN SIGNALLED >&2' TERM USR1\n"
        'LOCAL_RANK=0 bash -c \'trap "echo RANK HEARD >&2; exit 138" USR1; echo READY >&2; while :; do sleep .1; '
        "done' & while kill -0 $! 2>/dev/null; do wait $!; code=$?; done\n"
        'echo "failed (exitcode: $code) local_rank: 0 (pid: 1)" >&2; exit 1\n'
    )
    process = cluster.start("kubernetes.sh", *TRAIN, SKIP_CHECK="1")
    said = ""
    while "READY" not in said:
        said += process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert "RANK HEARD" in rest and "TORCHRUN SIGNALLED" not in rest
    assert process.returncode == 138, rest


def test_a_check_that_cannot_run_is_not_a_refusal(cluster):
    """127 blames the environment, not the configuration."""
    code, _, errors = cluster("mpi.sh", *TRAIN, CHECK_CODE="127")
    assert code == 2
    assert "could not run" in errors and "refuses" not in errors


def test_an_incomplete_checkpoint_is_passed_over(cluster):
    """The newest one was cut short: the one before is resumed, and `latest` names it."""
    checkpoint(cluster.folder / "ckpt", 10)
    checkpoint(cluster.folder / "ckpt", 20, complete=False)
    variables = {"CHECKPOINT_DIR": "ckpt", "RESUME_ARGS": "--from {dir} --tag {tag}"}
    _, notes, errors = cluster("mpi.sh", *TRAIN, **variables, SKIP_CHECK="1")
    assert of(notes, "python")[0][0] == [*FULL, "--from", "ckpt", "--tag", "global_step10"]
    assert "passed over global_step20" in errors
    assert (cluster.folder / "ckpt" / "latest").read_text() == "global_step10"
    (cluster.folder / "ckpt" / "latest").write_text("")
    code, _, errors = cluster("mpi.sh", *TRAIN, **variables, KEEP_LATEST="1", SKIP_CHECK="1")
    assert code == 2 and "KEEP_LATEST" in errors


def test_containers_see_every_folder_that_is_named(cluster):
    variables = {
        "CONTAINER_IMAGE": "me/image",
        "CHECKPOINT_DIR": "/data/ckpt",
        "HF_HOME": "/cache/hf",
        "SKIP_CHECK": "1",
    }
    _, notes, errors = cluster("slurm.sh", *TRAIN, **SLURM, **variables)
    (mounts,) = (word for word in of(notes, "srun")[-1][0] if word.startswith("--container-mounts="))
    for folder in (cluster.folder, LAUNCH, "/data/ckpt", "/cache/hf"):
        assert f"{folder}:{folder}" in mounts, errors


def test_the_fabric_and_threads(cluster):
    script = cluster.folder / "bin" / "python"
    script.write_text("#!/bin/sh\nenv > $NOTES.env\n")
    code, _, errors = cluster("mpi.sh", *TRAIN, FABRIC="efa", CPUS_PER_RANK="6", SKIP_CHECK="1")
    assert code == 0, errors
    found = dict(line.partition("=")[::2] for line in (cluster.folder / "notes.env").read_text().splitlines())
    assert (found["FI_PROVIDER"], found["OMP_NUM_THREADS"], found["TORCH_NCCL_DUMP_ON_TIMEOUT"]) == ("efa", "6", "1")
    assert cluster("mpi.sh", *TRAIN, FABRIC="token-ring", SKIP_CHECK="1")[0] == 2


def test_old_caches_go_and_strangers_caches_are_refused(cluster):
    """One folder for each environment; those that nobody has used for CACHE_DAYS are removed."""
    old = cluster.folder / "ds_fp8-me" / "env-1"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    code, _, errors = cluster("mpi.sh", *TRAIN, SKIP_CHECK="1")
    assert code == 0, errors
    assert not old.exists()
    assert len(list((cluster.folder / "ds_fp8-me").iterdir())) == 1
