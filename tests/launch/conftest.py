"""The fixtures of these tests: fakes for every launcher, a real Slurm, a second host."""

from tests.launch.fakes import cluster
from tests.launch.machines import slurm
from tests.launch.second_host import two_hosts

__all__ = ["cluster", "slurm", "two_hosts"]
