"""Hosts of a test are apart from each other and from the machine, and nothing of them is left."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.hosts.machines import Machine, machines

pytestmark = [pytest.mark.netns, pytest.mark.slow]


def said(machine: Machine, command: str) -> str:
    return machine.run(["bash", "-c", command], timeout_seconds=20).stdout.strip()


def left_of(process_id: int) -> list[str]:
    """Names of namespaces and cables that a process made."""
    tag = f"tn{process_id:x}"
    cables = [line.partition(":")[0] for line in Path("/proc/net/dev").read_text().splitlines()]
    names = [entry.name for entry in Path("/run/netns").glob("*")]
    return [name.strip() for name in (*cables, *names) if name.strip().startswith(tag)]


def test_hosts_have_names_addresses_processes_and_directories_of_their_own(tmp_path: Path) -> None:
    with machines(["one", "two"], tmp_path / "hosts") as hosts:
        one, two = hosts.values()
        assert said(one, "hostname") == "one"
        assert said(one, "getent hosts two").split() == [two.address, "two"]
        assert one.address != two.address
        assert int(said(one, "ls -d /proc/[0-9]* | wc -l")) < 10
        said(one, "touch /tmp/ray/mine /dev/shm/mine $HOME/mine")
        assert said(two, "ls /tmp/ray /dev/shm $HOME | grep mine") == ""
        shared = tmp_path / "shared"
        shared.mkdir()
        said(one, f"touch {shared}/ours")
        assert said(two, f"ls {shared}") == "ours"
        with two.without(shared):
            assert said(two, f"ls {shared}") == ""
        assert left_of(os.getpid())
    assert left_of(os.getpid()) == []
    assert not (tmp_path / "hosts").exists()


def test_power_off_ends_every_process_and_teardown_survives_a_failure(tmp_path: Path) -> None:
    def fail_with_a_host_gone() -> None:
        with machines(["one", "two"], tmp_path / "hosts") as hosts:
            sleeper = hosts["one"].start(["sleep", "60"], tmp_path / "log")
            hosts["one"].power_off()
            assert sleeper.wait(timeout=10) != 0
            hosts["one"].power_on()
            assert said(hosts["one"], "hostname") == "one"
            raise RuntimeError("a test failed")

    with pytest.raises(RuntimeError, match="a test failed"):
        fail_with_a_host_gone()
    assert left_of(os.getpid()) == []
    shown = subprocess.run(["ip", "-j", "netns"], capture_output=True, text=True, check=True)
    assert f"tn{os.getpid():x}" not in shown.stdout
