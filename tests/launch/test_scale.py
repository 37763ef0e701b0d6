"""5000 nodes, by name only: nothing in the scripts may grow, close a pipe early, or pass an argument that is too
long.
"""

from __future__ import annotations

import pytest

from tests.launch.fakes import PBS, SLURM, TRAIN, of

NODES = 5000
NAMES = [f"node{number:04}" for number in range(NODES)]


def test_slurm_reads_all_names_and_takes_the_first(cluster):
    """`scontrol | head -n 1` under pipefail ended 29 of 30 such jobs with 141."""
    (cluster.folder / "bin" / "scontrol").write_text(
        f"#!/bin/sh\n[ $2 = hostnames ] && seq -f 'node%04g' 0 {NODES - 1}\ntrue\n"
    )
    for _ in range(5):
        code, notes, errors = cluster("slurm.sh", *TRAIN, **SLURM, SKIP_CHECK="1")
        assert code == 0, errors
    assert {environment["MASTER_ADDR"] for _, environment in of(notes, "python")} == {"node0000"}


@pytest.mark.parametrize("version", ["mpirun (Open MPI) 5.0.3", "HYDRA build details"], ids=["openmpi", "mpich"])
def test_mpi_reads_a_hostfile_of_5000(cluster, version):
    (cluster.folder / "hosts").write_text("".join(f"{name}:8\n" for name in NAMES))
    for _ in range(5):
        code, notes, errors = cluster(
            "mpi.sh", *TRAIN, HOSTFILE="hosts", RANKS="40000", MPI_VERSION=version, SKIP_CHECK="1"
        )
        assert code == 0, errors
    assert {environment["MASTER_ADDR"] for _, environment in of(notes, "python")} == {"node0000"}


def test_hostfile_of_5000(cluster):
    (cluster.folder / "hosts").write_text("# all of them\n" + "".join(f"{name} slots=8\n" for name in NAMES))
    for _ in range(5):
        code, notes, errors = cluster("hostfile.sh", *TRAIN, HOSTFILE="hosts", SKIP_CHECK="1")
        assert code == 0, errors
    arguments = of(notes, "deepspeed")[-1][0]
    assert arguments[arguments.index("--master_addr") + 1] == "node0000"


def test_pbs_reads_a_node_file_of_40000_lines(cluster):
    (cluster.folder / "nodes").write_text("".join(f"{name}\n" * 8 for name in NAMES))
    code, notes, errors = cluster("pbs.sh", **PBS, WALLTIME_S="0", SKIP_CHECK="1")
    assert code == 0, errors
    arguments = of(notes, "mpirun")[0][0]
    assert arguments[:4] == ["-np", "40000", "--map-by", "ppr:8:node"]
