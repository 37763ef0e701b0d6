"""launch/mpi.sh under Open MPI and MPICH on two hosts, launch/hostfile.sh over pdsh: what reaches the far rank, and
what stays.
"""

from __future__ import annotations

import json
import signal
import subprocess

import psutil
import pytest

from tests.launch.machines import LAUNCH, RANK, need, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.dist, pytest.mark.timeout(400)]

CARRIED = {
    "NCCL_DEBUG": "WARN",
    "GLOO_SOCKET_IFNAME": "lo",
    "FI_PROVIDER": "tcp",
    "UCX_TLS": "tcp",
    "HF_HOME": "/tmp/with space",
    "WANDB_MODE": "offline",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "DS_FP8_DISABLE": "0",
    "MINE": "a=b 'c' $d",
}
"""What the ranks on every node need, a value that a shell would take apart included."""


class Started:
    """A launch script in the background, in a folder of its own."""

    def __init__(self, hosts, folder, script, **variables):
        self.folder = folder
        (folder / "ds.json").write_text(json.dumps({"fp8": {"enabled": True, "checkpoint_on_signal": "ckpt"}}))
        settings = {
            "DS_CONFIG": "ds.json",
            "CHECKPOINT_DIR": "ckpt",
            "SKIP_CHECK": "1",
            "LOG_DIR": "",
            "MARK": str(folder / "mark"),
        }
        # Unlike `environ` here the far side gets what the scripts carry, and no more.
        wishes = [
            name for name in variables if name in ("MINE", "STEPS", "STEP_S", "SAVE_EVERY", "DIE", "ONCE", "SAVES_ON")
        ]
        settings |= {"CARRY": " ".join([*wishes, "MARK"])}
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                ["bash", str(LAUNCH / script), str(RANK)],
                cwd=folder,
                env={**hosts.environment, **settings, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def end(self, limit_s: float = 120) -> int:
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None
        finally:
            for process in self.leftovers():
                process.kill()

    def until_said(self, *words: str) -> None:
        wait_for(lambda: all(word in self.said() for word in words), 90, self.said)

    def leftovers(self) -> list[psutil.Process]:
        """Ranks of this job that still live, on either host: they know its folder."""
        mark = str(self.folder / "mark")
        found = []
        for process in psutil.process_iter(["environ", "cmdline"]):
            if (process.info["environ"] or {}).get("MARK") == mark and str(RANK) in (process.info["cmdline"] or []):
                found.append(process)
        return found

    def report(self, rank: int, begin: int = 0) -> dict:
        return json.loads((self.folder / f"report_{rank}_{begin}.json").read_text())


FLAVORS = {
    "openmpi": {"MPIRUN": "mpirun.openmpi", "MPI_ARGS": "--allow-run-as-root --oversubscribe", "line": "{} slots=1"},
    "mpich": {"MPIRUN": "mpirun.mpich", "line": "{}:1"},
}


@pytest.fixture(params=FLAVORS)
def mpi(request, two_hosts, tmp_path):
    """Starts mpi.sh on two hosts, one rank each."""
    flavor = dict(FLAVORS[request.param])
    need(flavor["MPIRUN"])
    (tmp_path / "hosts").write_text("".join(flavor["line"].format(host) + "\n" for host in two_hosts.hosts))
    flavor.pop("line")

    def start(**variables):
        return Started(
            two_hosts,
            tmp_path,
            "mpi.sh",
            **{"HOSTFILE": "hosts", "RANKS": "2", "RANKS_PER_NODE": "1", **flavor, **variables},
        )

    return start


def test_the_far_rank_gets_the_environment(mpi):
    job = mpi(**CARRIED)
    assert job.end() == 0, job.said()
    for rank in (0, 1):
        report = job.report(rank)
        assert {name: report["env"].get(name) for name in CARRIED} == CARRIED
        assert (report["env"]["RANK"], report["env"]["LOCAL_RANK"], report["env"]["WORLD_SIZE"]) == (
            str(rank),
            "0",
            "2",
        )
    assert job.report(1)["node"] == "second-host"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["USR1", "TERM"])
def test_a_signal_saves_and_leaves_nobody_behind(mpi, number):
    """To the script alone, as a scheduler sends it: all ranks hear it, save, and are gone."""
    job = mpi(STEPS="600", STEP_S="0.2")
    job.until_said("STEP 0 2", "STEP 1 2")
    job.process.send_signal(number)
    assert job.end() != 0
    assert "SAVED 0" in job.said() and (job.folder / "ckpt" / "latest").exists(), job.said()
    wait_for(lambda: not job.leftovers(), 20)


def test_ranks_that_do_not_leave_are_ended(mpi):
    job = mpi(STEPS="600", STEP_S="60", GRACE_S="2")
    job.until_said("BEGIN 0", "BEGIN 1")
    job.process.send_signal(signal.SIGTERM)
    assert job.end(90) != 0
    wait_for(lambda: not job.leftovers(), 30)


def test_a_crash_is_tried_again_and_its_code_is_the_jobs(mpi):
    job = mpi(STEPS="20", STEP_S="0.1", SAVE_EVERY="2", DIE="1 5 7")
    assert job.end() == 7, job.said()
    assert job.said().count("launch: it ended with exit code 7; start 2 of 4, from global_step") == 1
    assert "not tried again" in job.said()


@pytest.fixture
def pdsh(two_hosts, tmp_path):
    need("pdsh")
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in two_hosts.hosts))

    def start(**variables):
        return Started(two_hosts, tmp_path, "hostfile.sh", **{"HOSTFILE": "hosts", **variables})

    return start


def test_pdsh_carries_the_environment_and_a_term_leaves_nobody_behind(pdsh):
    """DeepSpeed's launcher on two hosts: its remote ranks get what the list says, quotes and all; TERM ends them."""
    job = pdsh(**{**CARRIED, "STEPS": "6000", "STEP_S": "0.2"})
    wait_for(lambda: "STEP 0 2" in job.said() and "STEP 1 2" in job.said(), 200, job.said)
    for rank in (0, 1):
        found = job.report(rank)["env"]
        kept = {name: value for name, value in CARRIED.items() if name != "CUDA_VISIBLE_DEVICES"}  # DeepSpeed sets it
        assert {name: found.get(name) for name in kept} == kept
    assert job.report(0)["env"]["MASTER_ADDR"] == (job.folder / "hosts").read_text().split()[0]
    job.process.send_signal(signal.SIGTERM)
    assert job.end() != 0
    wait_for(lambda: not job.leftovers(), 60)


def test_pdsh_and_a_folder_with_a_space(pdsh, two_hosts, tmp_path):
    folder = tmp_path / "with space"
    folder.mkdir()
    job = Started(two_hosts, folder, "hostfile.sh", HOSTFILE=str(tmp_path / "hosts"))
    assert job.end() == 2
    assert "rename it or link to it" in job.said()


def test_one_machine_by_the_deepspeed_launcher(two_hosts, tmp_path):
    """USR1 to the script: the ranks hear it although `deepspeed` would die of it; the exit code is theirs."""
    job = Started(two_hosts, tmp_path, "hostfile.sh", DEEPSPEED_ARGS="--num_accelerators 2", STEPS="6000", STEP_S="0.2")
    wait_for(lambda: "STEP 0 2" in job.said() and "STEP 1 2" in job.said(), 200, job.said)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 128 + signal.SIGUSR1, job.said()
    assert "SAVED 0" in job.said()
    wait_for(lambda: not job.leftovers(), 20)
