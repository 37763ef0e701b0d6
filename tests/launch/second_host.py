"""A second host on one machine: a network namespace with a name of its own and an sshd, and one sshd on this side.

Hosts are named by their addresses, 10.<a>.<b>.1 and .2, on a veth pair that only these two share. `ssh` on the PATH
that this gives knows the key and asks nothing; nothing of the user's own ssh is read.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.machines import clean_environment, end, need

SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
ListenAddress {address}:22
PidFile {folder}/sshd-{address}.pid
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
MaxStartups 100
"""


class TwoHosts:
    def __init__(self, folder: Path):
        self.folder = folder
        number = os.getpid() % 60000
        self.namespace = f"ds_fp8_{number}"
        self.link = f"dsf{number}"
        prefix = f"10.{200 + number // 1000 % 50}.{number % 250 + 1}"
        self.hosts = [f"{prefix}.1", f"{prefix}.2"]
        self.daemons: list[subprocess.Popen] = []
        binaries = folder / "bin"
        binaries.mkdir()
        (binaries / "ssh").write_text(
            f"#!/bin/sh\nexec /usr/bin/ssh -q -i {folder}/user_key -o StrictHostKeyChecking=no -o IdentitiesOnly=yes"
            f' -o UserKnownHostsFile=/dev/null -F /dev/null "$@"\n'
        )
        (binaries / "ssh").chmod(0o755)
        environment = clean_environment()
        self.environment = {**environment, "PATH": f"{binaries}:{environment['PATH']}"}

    def start(self) -> None:
        here, there = self.hosts
        for key in ("host_key", "user_key"):
            self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        Path("/run/sshd").mkdir(exist_ok=True)
        self._run("ip", "netns", "add", self.namespace)
        self._run("ip", "link", "add", f"{self.link}a", "type", "veth", "peer", "name", f"{self.link}b")
        self._run("ip", "link", "set", f"{self.link}b", "netns", self.namespace)
        self._run("ip", "addr", "add", f"{here}/24", "dev", f"{self.link}a")
        self._run("ip", "link", "set", f"{self.link}a", "up")
        inside = ["ip", "netns", "exec", self.namespace]
        self._run(*inside, "ip", "addr", "add", f"{there}/24", "dev", f"{self.link}b")
        self._run(*inside, "ip", "link", "set", f"{self.link}b", "up")
        self._run(*inside, "ip", "link", "set", "lo", "up")
        named = [*inside, "unshare", "--uts", "sh", "-c", 'hostname second-host; exec "$@"', "sh"]
        for address, prefix in ((here, []), (there, named)):
            config = self.folder / f"sshd-{address}.conf"
            config.write_text(SSHD.format(folder=self.folder, address=address))
            command = [*prefix, "/usr/sbin/sshd", "-D", "-e", "-f", str(config)]
            with (self.folder / f"sshd-{address}.log").open("w") as log:
                self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment))
        for address in self.hosts:
            self._until_reached(address)

    def _until_reached(self, address: str) -> None:
        limit = time.monotonic() + 30
        while subprocess.run(["ssh", address, "true"], env=self.environment, capture_output=True).returncode:
            said = (self.folder / f"sshd-{address}.log").read_text()
            assert time.monotonic() < limit, said
            time.sleep(0.3)

    def stop(self) -> None:
        end([daemon.pid for daemon in self.daemons])
        for daemon in self.daemons:
            daemon.wait(10)
        for command in (["link", "del", f"{self.link}a"], ["netns", "del", self.namespace]):
            subprocess.run(["ip", *command], capture_output=True, env=self.environment)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=30)
        if done.returncode and command[:2] == ("ip", "netns"):
            pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory):
    need("ssh", "sshd", "ip")
    hosts = TwoHosts(tmp_path_factory.mktemp("hosts"))
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


def interrupt(process: subprocess.Popen, number: int = signal.SIGTERM) -> None:
    process.send_signal(number)
