"""Hosts of a hostfile on one machine: real sshd processes, each on an address of loopback."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from launch.environment import free_port

SSHD = "/usr/sbin/sshd"
START_SECONDS = 20.0
HOSTS = ("127.0.0.2", "127.0.0.3")


@dataclass(frozen=True)
class SshHosts:
    """Two hosts that answer, and how ssh reaches them."""

    directory: Path
    path: str
    """PATH on which `ssh` reads the hosts' configuration: ssh itself ignores HOME."""
    processes: dict[str, subprocess.Popen[bytes]]

    def differ(self, host: str, here: str, there: str) -> None:
        """Let a path mean another one on a host, as it does where directories differ."""
        (self.directory / f"{host}.sed").write_text(f"s#{here}#{there}#g\n")

    def agree(self) -> None:
        """Let all paths mean the same everywhere."""
        for host in HOSTS:
            (self.directory / f"{host}.sed").write_text("")

    def configure(self, host: str, **options: str) -> None:
        """Add a host to ssh's configuration."""
        lines = [f"Host {host}", *(f"  {name} {value}" for name, value in options.items())]
        with (self.directory / "config").open("a") as stream:
            stream.write("\n".join(lines) + "\n")

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(timeout=20)


def start_hosts(directory: Path) -> SshHosts:
    """Start an sshd for each host, with keys of their own, and the ssh that knows them."""
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host-key", "user-key", "foreign-key"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(make, check=True)
    shutil.copy(directory / "user-key.pub", directory / "authorized_keys")
    host_key = (directory / "host-key.pub").read_text()
    processes = {host: start_sshd(directory, host, host_key) for host in HOSTS}
    bin_dir = directory / "bin"
    bin_dir.mkdir()
    shim = bin_dir / "ssh"
    shim.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {directory / "config"} "$@"\n')
    shim.chmod(0o755)
    path = f"{bin_dir}{os.pathsep}{os.environ['PATH']}"
    hosts = SshHosts(directory=directory, path=path, processes=processes)
    for host in HOSTS:
        port = (directory / f"{host}.port").read_text()
        hosts.configure(host, **login(directory), Port=port)
    hosts.agree()
    return hosts


def login(directory: Path) -> dict[str, str]:
    """Give the options with which a host lets us in."""
    return {
        "User": getpass.getuser(),
        "IdentityFile": str(directory / "user-key"),
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": str(directory / "known_hosts"),
        "GlobalKnownHostsFile": "/dev/null",
    }


def start_sshd(directory: Path, host: str, host_key: str) -> subprocess.Popen[bytes]:
    port = free_port()
    (directory / f"{host}.port").write_text(str(port))
    with (directory / "known_hosts").open("a") as stream:
        stream.write(f"[{host}]:{port} {host_key}")
    entry = directory / f"{host}.sh"
    # Runs what it is asked for, with the paths that this host has.
    entry.write_text(f'eval "$(printf %s "$SSH_ORIGINAL_COMMAND" | sed -f {directory}/{host}.sed)"')
    config = directory / f"{host}.conf"
    config.write_text(
        f"Port {port}\nListenAddress {host}\nHostKey {directory / 'host-key'}\n"
        f"PidFile {directory / host}.pid\nAuthorizedKeysFile {directory / 'authorized_keys'}\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nLogLevel ERROR\n"
        f"ForceCommand sh {entry}\n"
    )
    with (directory / f"{host}.log").open("wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stdout=log, stderr=log)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return process
        time.sleep(0.05)
    raise AssertionError((directory / f"{host}.log").read_text())
