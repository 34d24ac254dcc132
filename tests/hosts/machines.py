"""Hosts on one machine: namespaces with their own address, name, processes and temporary files.

A host is a network, process, mount, name and IPC namespace on a bridge whose other side, the
machine itself, plays a client outside. A directory that all of them see plays shared storage.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SHM_BYTES = 1 << 30
INIT = (
    'hostname "$1" && mount -t tmpfs -o size="$2" shm /dev/shm && mount -t tmpfs run /run '
    '&& mkdir -p /run/sshd /tmp/ray && mount --bind "$3" /tmp/ray && echo up '
    "&& trap : TERM && sleep infinity & wait"
)
"""What the first process of a host does; as a shell it also buries what loses its parent."""


class Machine:
    """One host: how to run something on it, and how it loses power."""

    def __init__(self, name: str, address: str, place: Path, namespace: str, cable: str) -> None:
        """Switch the host on, in a network namespace that exists.

        Args:
            name: Host name, which its peers resolve.
            address: Its IPv4 address.
            place: Directory of its home and temporary files.
            namespace: Name of the network namespace.
            cable: Device at the other end of its network cable.
        """
        self.name = name
        self.address = address
        self.place = place
        self.variables: dict[str, str] = {}
        """What a login on this host finds set, beside what every host has."""
        self._namespace = namespace
        self._cable = cable
        (place / "home").mkdir(parents=True)
        self.power_on()

    def power_on(self) -> None:
        """Start the first process of the host; its temporary files are gone, as after a boot."""
        for part in ("tmp", "ray"):
            shutil.rmtree(self.place / part, ignore_errors=True)
            (self.place / part).mkdir()
        command = [
            "setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self._namespace,
            "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--mount-proc",
            "--uts", "--ipc", "bash", "-c", INIT,
            "init", self.name, str(SHM_BYTES), str(self.place / "ray"),
        ]  # fmt: skip
        log = self.place / "host.log"
        with log.open("wb") as errors:
            self._outer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd="/")
        assert self._outer.stdout is not None
        if self._outer.stdout.readline() != b"up\n":
            self._outer.kill()
            raise AssertionError(f"host {self.name} did not come up: {log.read_text()}")
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        self._init = int(children.read_text().split()[0])

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Give the variables of a login on this host."""
        own = {
            "HOME": str(self.place / "home"),
            "TMPDIR": str(self.place / "tmp"),
            # All nodes of a Ray cluster use one path; `/tmp/ray` is each host's own.
            "RAY_TMPDIR": "/tmp",
            "XDG_CACHE_HOME": str(self.place / "home" / ".cache"),
            "TORCH_EXTENSIONS_DIR": str(self.place / "home" / "torch_extensions"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        return {**os.environ, **own, **self.variables, **(extra or {})}

    def command(self, words: Sequence[str | Path], cwd: Path = ROOT) -> list[str]:
        """Give the command that runs another one on this host; it starts at `/` without a `-C`."""
        inside = ["nsenter", "-t", str(self._init), "-n", "-p", "-m", "-u", "-i", "--"]
        return [*inside, "env", "-C", str(cwd), *map(str, words)]

    def start(
        self, words: Sequence[str | Path], log: Path, extra: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on this host, its output going to the end of a file."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                self.command(words), env=self.environment(extra), stdin=subprocess.DEVNULL,
                stdout=stream, stderr=stream,
            )  # fmt: skip

    def run(
        self,
        words: Sequence[str | Path],
        timeout_seconds: float,
        extra: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end."""
        return subprocess.run(
            self.command(words), env=self.environment(extra), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout_seconds, check=False,
        )  # fmt: skip

    @contextmanager
    def without(self, directory: Path) -> Iterator[None]:
        """Hide a directory from this host while the block runs, as a missing mount does."""
        self._must(["mount", "-t", "tmpfs", "nothing", directory])
        try:
            yield
        finally:
            self._must(["umount", directory])

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Cut this host off from all others while the block runs; its processes go on."""
        ip("link", "set", self._cable, "down")
        try:
            yield
        finally:
            ip("link", "set", self._cable, "up")

    def power_off(self) -> None:
        """Kill every process of this host at once."""
        if self._outer.poll() is None:
            os.kill(self._init, signal.SIGKILL)
        self._outer.wait(timeout=20)
        if self._outer.stdout is not None:
            self._outer.stdout.close()

    def _must(self, words: Sequence[str | Path]) -> None:
        done = self.run(words, timeout_seconds=20)
        assert done.returncode == 0, done.stderr


@contextmanager
def machines(names: Sequence[str], place: Path) -> Iterator[dict[str, Machine]]:
    """Hold hosts of these names while the block runs; nothing of them is left, whatever happens.

    Args:
        names: Host names, in the order of their addresses.
        place: An empty directory with a short path, seen by all.

    Yields:
        The hosts by name.
    """
    remove_abandoned()
    tag = f"tn{os.getpid():x}"
    net = free_subnet()
    addresses = {name: f"{net}.{10 + number}" for number, name in enumerate(names)}
    started: dict[str, Machine] = {}
    try:
        ip("link", "add", f"{tag}b", "type", "bridge")
        ip("addr", "add", f"{net}.1/24", "dev", f"{tag}b")
        ip("link", "set", f"{tag}b", "up")
        for number, (name, address) in enumerate(addresses.items()):
            namespace = f"{tag}-{name}"
            write_names(namespace, addresses)
            cable = f"{tag}v{number}"
            plug_in(namespace, cable, f"{tag}b", address)
            started[name] = Machine(name, address, place / name, namespace, cable)
        yield started
    finally:
        for machine in started.values():
            machine.power_off()
        remove_network(tag)
        shutil.rmtree(place, ignore_errors=True)


def plug_in(namespace: str, cable: str, bridge: str, address: str) -> None:
    ip("netns", "add", namespace)
    ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    ip("link", "set", cable, "master", bridge, "up")
    ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        ip("-n", namespace, "link", "set", device, "up")


def write_names(namespace: str, addresses: Mapping[str, str]) -> None:
    """Write the files that `ip netns exec` lays over those in /etc.

    Without `hosts: files` every look-up of a peer's name waits 10 s for a server out of reach.
    """
    directory = Path("/etc/netns") / namespace
    directory.mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (directory / "hosts").write_text("\n".join(lines) + "\n")
    (directory / "nsswitch.conf").write_text("hosts: files\npasswd: files\ngroup: files\n")
    (directory / "resolv.conf").write_text("")


def free_subnet() -> str:
    """Give the first three numbers of a network of 254 addresses that this machine lacks."""
    shown = subprocess.run(["ip", "-4", "-j", "route"], capture_output=True, check=True)
    taken = {route["dst"] for route in json.loads(shown.stdout)}
    first = os.getpid() % 16384
    nets = (f"10.{64 + number // 256}.{number % 256}" for number in range(first, first + 100))
    return next(net for net in nets if f"{net}.0/24" not in taken)


def remove_network(tag: str) -> None:
    """Remove the cables first: a namespace goes later than its name, and its cable with it."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        device = line.partition(":")[0].strip()
        if re.fullmatch(rf"{tag}(v\d+|b)", device):
            ip("link", "del", device)
    for entry in Path("/etc/netns").glob(f"{tag}-*"):
        if (Path("/run/netns") / entry.name).exists():
            ip("netns", "del", entry.name)
        shutil.rmtree(entry)
    with suppress(OSError):
        Path("/etc/netns").rmdir()


def remove_abandoned() -> None:
    """Remove what a session left that was killed; its hosts died with it."""
    names = [entry.name for entry in Path("/etc/netns").glob("tn*-*")]
    for tag in {name.partition("-")[0] for name in names}:
        if not Path(f"/proc/{int(tag[2:], 16)}").exists():
            remove_network(tag)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)
