"""launch/pbs.sh against fakes of PBS and MPI: the node file, the limit, the successor. No PBS can be had on a test
machine.
"""

from __future__ import annotations

import time

from tests.launch.fakes import FULL, LAUNCH, PBS, checkpoint, of


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


QSTAT = """#!/bin/sh
cat <<END
Job Id: 99.server
    Job_Name = pretrain
    queue = large
    Account_Name = physics
    project = _pbs_project_default
    Resource_List.ncpus = 256
    Resource_List.place = scatter:excl
    Resource_List.select = 4:ncpus=64:ngpus=8:mpiprocs=8
    Resource_List.walltime = 00:04:01
END
"""


def with_qstat(cluster):
    (cluster.folder / "nodes").write_text("nodeB\n")
    (cluster.folder / "bin" / "qstat").write_text(QSTAT)
    (cluster.folder / "bin" / "qstat").chmod(0o755)


def test_the_successor_asks_for_what_this_job_asked_for(cluster):
    """Resources, queue, account and name of the command line; the user's variables, and none that this job made."""
    with_qstat(cluster)
    code, notes, errors = cluster("pbs.sh", **PBS, LAUNCHER_SLEEPS="3", MAX_REQUEUES="7", NCCL_DEBUG="INFO")
    assert code == 0, errors
    (arguments, _) = of(notes, "qsub")[0]
    asked = dict(zip(arguments[::2], arguments[1::2], strict=False))
    resources = [arguments[i + 1] for i, word in enumerate(arguments) if word == "-l"]
    assert resources == ["select=4:ncpus=64:ngpus=8:mpiprocs=8", "place=scatter:excl", "walltime=00:04:01"]
    assert (asked["-q"], asked["-A"], asked["-N"]) == ("large", "physics", "pretrain")
    names = asked["-v"].split(",")
    assert {"DS_CONFIG", "TRAIN", "RESTART_COUNT", "MAX_REQUEUES", "NCCL_DEBUG", "LAUNCH_DIR"} <= set(names)
    assert not {"NODE_CACHE", "TRITON_CACHE_DIR", "MASTER_ADDR", "MASTER_PORT", "HOSTFILE", "RANKS"} & set(names)


def test_successors_have_an_end(cluster):
    with_qstat(cluster)
    code, notes, errors = cluster("pbs.sh", **PBS, LAUNCHER_SLEEPS="3", RESTART_COUNT="7", MAX_REQUEUES="7")
    assert code == 1
    assert of(notes, "qsub") == [] and "already 7 successors" in errors


def test_no_progress_no_successor(cluster):
    """A limit in which no checkpoint is reached would queue the same job for ever."""
    with_qstat(cluster)
    checkpoint(cluster.folder / "ckpt", 20)
    code, notes, errors = cluster("pbs.sh", **PBS, LAUNCHER_SLEEPS="3", CHECKPOINT_DIR="ckpt")
    assert code == 1
    assert of(notes, "qsub") == [] and "no checkpoint since this start" in errors


def test_a_limit_below_the_warning_is_refused(cluster):
    (cluster.folder / "nodes").write_text("nodeB\n")
    code, notes, errors = cluster("pbs.sh", **PBS, WALLTIME_S="100")
    assert (code, notes) == (2, [])
    assert "WALLTIME_S=100" in errors


def test_nobody_holds_the_output_after_the_end(cluster):
    """The timer's sleep of half a day must not keep the pipe of whoever reads this job's output."""
    (cluster.folder / "nodes").write_text("nodeB\n")
    begin = time.monotonic()
    code, _, errors = cluster("pbs.sh", **PBS, WALLTIME_S="43200")
    assert code == 0, errors
    assert time.monotonic() - begin < 45, "communicate() ends when the last holder of the pipe is gone"
