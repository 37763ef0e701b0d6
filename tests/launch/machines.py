"""Real launchers on one machine: Slurm with two nodes, Open MPI, MPICH, and a second host behind ssh in a network
namespace.

Nothing of the machine's own is used or changed: every daemon gets its configuration, key, ports and folders from the
test, is ended by its pid, and listens on 127.0.0.1 or inside the namespace. What is not installed is installed where
DS_FP8_TEST_INSTALL=1 (CI; needs root and apt-get), else the test is skipped, with the reason.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import ds_fp8

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
RANK = Path(__file__).with_name("rank.py")
PACKAGES = {
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "mpirun.openmpi": "openmpi-bin",
    "mpirun.mpich": "mpich",
    "pdsh": "pdsh",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ip": "iproute2",
}
"""Program -> Debian package."""


def need(*programs: str) -> None:
    """Have these programs, or skip with the reason."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in programs if not shutil.which(name, path=path)]
    if missing and os.environ.get("DS_FP8_TEST_INSTALL") == "1" and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        wanted = sorted({PACKAGES[name] for name in missing})
        for command in (["update"], ["install", "-y", "--no-install-recommends", *wanted]):
            # One at a time: another worker of the tests may install, too, and apt refuses to wait for its lists.
            command = ["flock", "/tmp/ds_fp8_tests_apt.lock", "apt-get", "-q", *command]
            subprocess.run(command, env=environment, capture_output=True, timeout=400)
        missing = [name for name in programs if not shutil.which(name, path=path)]
    if missing:
        packages = sorted({PACKAGES[name] for name in missing})
        pytest.skip(f"not installed: {' '.join(packages)} (apt-get install, or DS_FP8_TEST_INSTALL=1 as root)")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons and network namespaces need root here")


def wait_for(condition, limit_s: float = 60, what: str = "it did not happen"):
    """The first true value of `condition()`."""
    end = time.monotonic() + limit_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, what if isinstance(what, str) else what()
        time.sleep(0.1)


def clean_environment(**more: str) -> dict[str, str]:
    """PATH with this Python first, nothing of an outer job."""
    outer = ("SLURM", "OMPI", "PMI", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "DS_FP8", "CHECKPOINT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}:/usr/sbin:/sbin"
    package = str(Path(ds_fp8.__file__).resolve().parents[1])
    return {**kept, "PATH": path, "PYTHONPATH": package, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more}


def end(pids: list[int]) -> None:
    """TERM, then KILL, to processes that a test has started, and what descends from them."""
    processes = []
    for pid in pids:
        try:
            parent = psutil.Process(pid)
            processes += [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    for process in psutil.wait_procs(processes, timeout=5)[1]:
        process.kill()


SLURM_CONF = """
ClusterName=ds_fp8_test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmctldParameters=enable_configless
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=pmi2
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
KillWait=5
SlurmdTimeout=8
MinJobAge=3600
JobRequeue=1
MailProg=/bin/true
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10
"""


class Slurm:
    """munged, slurmctld and two slurmd with folders and ports of their own."""

    def __init__(self, folder: Path):
        self.folder, self.pids = folder, []
        base = 21000 + os.getpid() % 9000
        self.host = os.uname().nodename
        text = SLURM_CONF.format(host=self.host, port=base, first=base + 1, last=base + 2, folder=folder)
        (folder / "slurm.conf").write_text(text)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        self.environment = clean_environment(SLURM_CONF=str(folder / "slurm.conf"))

    def start(self) -> None:
        options = [
            f"--{name}={self.folder}/munge.{name.split('-')[0]}"
            for name in ("socket", "key-file", "pid-file", "log-file")
        ]
        options += [f"--seed-file={self.folder}/munge.seed", "--force"]
        self._run("munged", *options)
        self._run("slurmctld", "-c")
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_for(lambda: self._run("sinfo", "-h", "-o", "%T").split() == ["idle"], 60, self.logs)

    def start_node(self, node: str) -> None:
        self._run("slurmd", "-N", node)

    def pid(self, name: str) -> int:
        return int((self.folder / f"{name}.pid").read_text())

    def stop(self) -> None:
        self._run("scancel", "--user=root", check=False)
        time.sleep(1)
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munge"):
            if (self.folder / f"{name}.pid").exists():
                end([self.pid(name)])
        steps = [
            p.pid
            for p in psutil.process_iter(["environ"])
            if (p.info["environ"] or {}).get("SLURM_CONF") == self.environment["SLURM_CONF"]
        ]
        end([pid for pid in steps if pid != os.getpid()])

    def _run(self, *command: str, check: bool = True, **more) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, **more)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))

    def submit(
        self, folder: Path, *arguments: str, script: str = "slurm.sh", **variables: str
    ) -> subprocess.CompletedProcess:
        """launch/slurm.sh on the login node."""
        environment = {
            **self.environment,
            "DS_CONFIG": "ds.json",
            "SBATCH_ARGS": "--nodes=2 --ntasks-per-node=1",
            **variables,
        }
        command = ["bash", str(LAUNCH / script), *(arguments or (str(RANK),))]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    def show(self, job: str) -> dict[str, str]:
        words = self._run("scontrol", "-o", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def until_over(self, job: str, limit_s: float = 120) -> tuple[str, int]:
        """(state, exit code of the batch script) once the job has ended for good."""

        # Slurm lets a requeued job wait two minutes; a test need not. But a start in the second of the requeue is
        # refused by slurmd ("already killed", exit code 1): credentials are revoked by whole seconds.
        def over() -> bool:
            shown = self.show(job)
            if shown["JobState"] == "PENDING" and int(shown["Restarts"]):
                time.sleep(2)
                self._run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return shown["JobState"] not in live

        live = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING", "SUSPENDED")
        wait_for(over, limit_s, lambda: f"{self.show(job)} {self.logs()}")
        shown = self.show(job)
        return shown["JobState"], int(shown["ExitCode"].split(":")[0])


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Two nodes, n1 and n2, on this machine."""
    need("sbatch", "munged")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
