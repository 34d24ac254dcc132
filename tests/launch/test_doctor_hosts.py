"""doctor over ssh: two real sshd processes play the hosts, whole and broken in single ways."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from launch.doctor_finding import Finding
from launch.doctor_hosts import compare_hosts, pdsh, reach, read_hosts
from launch.doctor_link import Link, ask_all
from launch.doctor_storage import examine_clocks, examine_storage
from launch.doctor_versions import COMPARED_PACKAGES
from tests.launch.ssh_hosts import HOSTS, SSHD, SshHosts, login, start_hosts

pytestmark = [pytest.mark.slow, pytest.mark.needs_program(SSHD), pytest.mark.needs_program("pdsh")]

ROOT = Path(__file__).resolve().parents[2]
Links = dict[str | None, Link]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHosts]:
    hosts = start_hosts(tmp_path_factory.mktemp("ssh"))
    yield hosts
    hosts.stop()


@pytest.fixture
def hosts(sshd: SshHosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshHosts]:
    monkeypatch.setenv("PATH", sshd.path)
    monkeypatch.chdir(ROOT)
    yield sshd
    sshd.agree()


@pytest.fixture
def open_links(hosts: SshHosts) -> Iterator[Callable[[], Links]]:
    """Opens this machine and both hosts as they are at that moment."""
    with ExitStack() as stack:

        def open_now() -> Links:
            links, findings = reach(HOSTS, stack)
            assert [finding.verdict for finding in findings] == ["ok"], findings
            return links

        yield open_now


def by_name(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_two_healthy_hosts_have_nothing_that_fails(cli, hosts: SshHosts, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    shown = cli("doctor", "--hostfile", hostfile, "--shared", tmp_path, "--json")
    found = {finding["name"]: finding for finding in shown.tree["findings"]}
    assert [f for f in shown.tree["findings"] if f["verdict"] == "fail"] == []
    assert shown.code == 0
    everywhere = {"hostfile", "ssh", "pdsh", "python", "code", "packages", "clock", "storage"}
    everywhere |= {"device", "names"}
    assert {found[name]["verdict"] for name in everywhere} == {"ok"}
    pair = found["all-reduce"]["values"]
    assert found["all-reduce"]["host"] == "127.0.0.2 - 127.0.0.3"
    assert pair["bytes_per_second"] > 1e6
    assert 0 < pair["latency_seconds"] < 1
    assert abs(found["clock"]["values"]["offset_seconds"]) < 1
    assert list(tmp_path.glob(".tandem-doctor*")) == []


def test_a_changed_file_on_one_host_is_named(
    hosts: SshHosts, open_links: Callable[[], Links], tmp_path: Path
) -> None:
    copy = tmp_path / "checkout"
    for name in ("launch", "pipeline"):
        ignored = shutil.ignore_patterns("__pycache__", "corpus")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    environment = Path(sys.prefix)
    if environment.is_relative_to(ROOT):
        (copy / environment.relative_to(ROOT)).symlink_to(environment)
    with (copy / "launch" / "worker.py").open("a") as stream:
        stream.write("# changed\n")
    hosts.differ(HOSTS[1], str(ROOT), str(copy))
    facts, errors = ask_all(open_links(), "facts", packages=COMPARED_PACKAGES)
    assert errors == {}
    findings = by_name(list(compare_hosts(facts)))
    assert findings["code"].verdict == "fail"
    assert findings["code"].host == HOSTS[1]
    assert findings["code"].found.endswith("differs in launch/worker.py")
    assert str(copy) in str(findings["code"].advice)
    assert findings["packages"].verdict == "ok"


def test_packages_that_differ_are_named_with_both_versions(
    hosts: SshHosts, open_links: Callable[[], Links], tmp_path: Path
) -> None:
    # A package metadata directory that stands first on the path, as another installation would.
    info = tmp_path / "safetensors-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.1\n")
    hosts.differ(HOSTS[0], "PYTHONPATH=", f"PYTHONPATH={tmp_path}:")
    facts, _ = ask_all(open_links(), "facts", packages=COMPARED_PACKAGES)
    finding = by_name(list(compare_hosts(facts)))["packages"]
    assert (finding.verdict, finding.host) == ("fail", HOSTS[0])
    assert finding.found == "differ from here: safetensors 0.1"
    assert f"safetensors=={facts[None]['packages']['safetensors']}" in str(finding.advice)


def test_storage_that_one_host_has_for_itself_is_not_shared(
    hosts: SshHosts,
    open_links: Callable[[], Links],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for directory in (here, there):
        (directory / "runs").mkdir(parents=True)
    monkeypatch.chdir(here)
    # One path, two directories: as where a host has a disk of its own instead of the mount.
    shared = Path("/proc/self/cwd/runs")
    hosts.differ(HOSTS[1], str(here), str(there))
    links = {host: link for host, link in open_links().items() if host is not None}
    findings = by_name(list(examine_storage(shared, links)))
    assert (findings["storage"].verdict, findings["storage"].host) == ("fail", HOSTS[1])
    assert "is another directory" in findings["storage"].found

    (absent,) = examine_storage(tmp_path / "absent", links)
    assert absent.verdict == "fail"
    assert f"mkdir -p {tmp_path / 'absent'}" in str(absent.advice)
    (tmp_path / "here" / "only-here").mkdir()
    lacking = list(examine_storage(Path("/proc/self/cwd/only-here"), links))
    assert [(f.host, f.verdict) for f in lacking][0] == (HOSTS[1], "fail")
    assert "is absent there" in lacking[0].found
    assert list(here.rglob(".tandem*")) == list(there.rglob(".tandem*")) == []


def test_a_host_without_this_python_says_what_is_missing(hosts: SshHosts) -> None:
    hosts.differ(HOSTS[1], sys.executable, "/nowhere/python")
    with ExitStack() as stack:
        links, findings = reach(HOSTS, stack)
    assert set(links) == {None, HOSTS[0]}
    (finding,) = findings
    assert (finding.verdict, finding.host) == ("fail", HOSTS[1])
    assert "/nowhere/python" in finding.found
    assert "virtual environment" in str(finding.advice)


@pytest.mark.parametrize(
    ("host", "options", "words", "advice"),
    [
        ("127.0.0.4", {"Port": "1"}, "Connection refused", "start sshd on 127.0.0.4"),
        (
            "stranger",
            {"HostName": HOSTS[0], "UserKnownHostsFile": "/dev/null"},
            "Host key verification failed",
            "log in once by hand (`ssh stranger`)",
        ),
        (
            "locked",
            {"HostName": HOSTS[0], "IdentityFile": "foreign-key"},
            "Permission denied",
            "ssh-copy-id locked",
        ),
    ],
)
def test_a_host_that_ssh_cannot_enter_is_explained(
    hosts: SshHosts, host: str, options: dict[str, str], words: str, advice: str
) -> None:
    port = (hosts.directory / f"{HOSTS[0]}.port").read_text()
    settings = login(hosts.directory) | {"Port": port} | options
    if "IdentityFile" in options:
        settings["IdentityFile"] = str(hosts.directory / options["IdentityFile"])
    hosts.configure(host, **settings)
    with ExitStack() as stack:
        links, findings = reach([host], stack)
    assert set(links) == {None}
    (finding,) = findings
    assert (finding.verdict, finding.host) == ("fail", host)
    assert words in finding.found
    assert advice in str(finding.advice)


def test_a_host_that_is_off_costs_seconds(hosts: SshHosts) -> None:
    # 198.51.100.0/24 is TEST-NET-2 of RFC 5737: no host has such an address.
    started = time.monotonic()
    with ExitStack() as stack:
        links, findings = reach(["198.51.100.7"], stack)
    assert time.monotonic() - started < 30
    assert set(links) == {None}
    assert [finding.verdict for finding in findings] == ["fail"]
    assert "198.51.100.7" in str(findings[0].advice)


def test_pdsh_names_the_host_that_it_does_not_reach(hosts: SshHosts) -> None:
    hosts.configure("127.0.0.5", **login(hosts.directory), Port="1")
    findings = list(pdsh([HOSTS[0], "127.0.0.5"]))
    assert [(f.verdict, f.host) for f in findings] == [("fail", "127.0.0.5")]
    assert "refused" in findings[0].found
    assert [f.verdict for f in pdsh(HOSTS)] == ["ok"]


def test_clocks_of_one_machine_agree_within_the_round_trip(
    open_links: Callable[[], Links],
) -> None:
    links = {host: link for host, link in open_links().items() if host is not None}
    (finding,) = examine_clocks(links)
    assert finding.verdict == "ok"
    assert finding.values["offset_seconds"] < 1.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "No such file"),
        ("node-a slots=one\n", "is not of the form"),
        ("node-a slots=1\nnode-a slots=1\n", "stands twice"),
    ],
)
def test_a_broken_hostfile_is_a_finding(tmp_path: Path, text: str | None, found: str) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    hosts, (finding,) = read_hosts(path)
    assert hosts == {}
    assert finding.verdict == "fail"
    assert found in finding.found
    assert os.fspath(path) in finding.found
