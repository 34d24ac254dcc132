"""doctor on this machine and on services: real conditions, whole and broken in single ways."""

import os
import resource
import socket
import statistics
import time
from itertools import combinations
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from launch.doctor_bandwidth import (
    choose_backend,
    judge_device,
    judge_devices,
    judge_pairs,
    plan_rounds,
)
from launch.doctor_finding import Finding, Reporter
from launch.doctor_link import HostError, Link
from launch.doctor_machine import examine_machine, extension_locks
from launch.doctor_mlflow import examine_mlflow
from launch.doctor_network import judge_networks, nccl_interface, reverse
from launch.doctor_page import lines_of
from launch.doctor_ray import examine_ray, judge_nodes, judge_token
from launch.doctor_storage import ClockSample, clock_offset, judge_clock
from launch.doctor_versions import judge_versions
from launch.environment import free_port


@pytest.mark.slow
def test_a_healthy_machine_has_nothing_that_fails(cli) -> None:
    shown = cli("doctor", "--json")
    findings = shown.tree["findings"]
    assert [finding for finding in findings if finding["verdict"] == "fail"] == []
    assert shown.code == 0
    assert {tuple(sorted(finding)) for finding in findings} == {
        ("advice", "found", "host", "name", "subject", "values", "verdict")
    }
    assert shown.tree["schema_version"] == 1
    assert sum(shown.tree["num_findings"].values()) == len(findings)
    (pair,) = (finding for finding in findings if finding["subject"] == "bandwidth")
    assert (pair["name"], pair["host"]) == ("all-reduce", "rank 0 - rank 1")
    assert pair["values"]["bytes_per_second"] > 1e6


@pytest.mark.slow
def test_what_is_broken_is_told_together_and_fails(cli, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-a slots=none\n")
    silent = free_port()
    started = time.monotonic()
    shown = cli(
        "doctor", "--hostfile", hostfile, "--ray", f"127.0.0.1:{silent}",
        "--tracking", f"http://127.0.0.1:{silent}", "--shared", tmp_path / "absent",
    )  # fmt: skip
    # A plain MLflow client alone would take 247 s.
    assert time.monotonic() - started < 120
    assert shown.code == 1
    lines = shown.out.splitlines()
    failed = [line.split()[1] for line in lines if line.startswith("  FAIL")]
    assert failed == ["hostfile", "storage", "address", "server"]
    for line, below in zip(lines, lines[1:], strict=False):
        assert not line.startswith("  FAIL") or below.strip()
    assert shown.out.count("-> ") >= len(failed)
    assert lines[-1].endswith("4 that would make a run fail")


def test_versions_below_a_floor_say_why() -> None:
    installed = {
        "torch": "2.5.1", "deepspeed": "0.19.8", "ray": "2.55.0", "mlflow": "3.9.0",
        "pyarrow": "14.0.0", "datasets": "4.0.0",
    }  # fmt: skip
    ranges = {"deepspeed": SpecifierSet(">=0.19.9"), "datasets": SpecifierSet(">=4.0")}
    findings = {finding.name: finding for finding in judge_versions(installed, ranges)}
    assert {name for name, finding in findings.items() if finding.verdict == "ok"} == {"datasets"}
    for name, reason in {
        "torch": "CVE-2025-32434", "ray": "CVE-2026-41486", "mlflow": "CVE-2026-2652",
        "pyarrow": "CVE-2023-47248", "deepspeed": "tested with",
    }.items():  # fmt: skip
        assert reason in str(findings[name].advice)
        assert f"pip install '{name}" in str(findings[name].advice)
    at_floor = installed | {
        "torch": "2.10.0", "ray": "2.56.0", "mlflow": "3.10.0", "pyarrow": "14.0.1",
    }  # fmt: skip
    assert {finding.verdict for finding in judge_versions(at_floor, {})} == {"ok"}
    del at_floor["torch"]
    (absent,) = (f for f in judge_versions(at_floor, {}) if f.name == "torch")
    assert (absent.verdict, absent.found) == ("fail", "not installed")


def test_an_old_lock_of_a_compile_is_found_and_a_new_one_is_not(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert extension_locks(environment).verdict == "ok"
    os.utime(lock, (time.time() - 3600,) * 2)
    finding = extension_locks(environment)
    assert finding.verdict == "warn"
    assert f"rm {lock}" in str(finding.advice)


def test_few_open_files_and_a_taken_port_are_warned_about() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 29500))
        taken.listen()
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
        try:
            findings = {finding.name: finding for finding in examine_machine()}
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert findings["open files"].verdict == findings["port 29500"].verdict == "warn"
    assert "ulimit -n 65536" in str(findings["open files"].advice)


def test_the_shortest_round_trip_bounds_the_clock_offset() -> None:
    # A host 3.2 s ahead; the way there and back takes unequal times.
    ahead = 3.2
    ways = [(0.010, 0.200), (0.002, 0.004), (0.300, 0.001)]
    samples = [
        ClockSample(
            sent_seconds=start,
            there_seconds=start + there + ahead,
            received_seconds=start + there + back,
        )
        for start, (there, back) in enumerate(ways, 1000)
    ]
    offset = clock_offset(samples)
    assert offset.seconds == pytest.approx(ahead + (0.002 - 0.004) / 2, abs=1e-9)
    assert offset.uncertainty_seconds == pytest.approx((0.002 + 0.004) / 2, abs=1e-9)
    assert abs(offset.seconds - ahead) <= offset.uncertainty_seconds
    finding = judge_clock(offset, Reporter("hosts", "node-a"))
    assert (finding.verdict, finding.found[:15]) == ("warn", "3.199 s ahead o")
    # The same distance is no finding where the round trip may explain it.
    slow = clock_offset([ClockSample(sent_seconds=0, there_seconds=5, received_seconds=9)])
    assert judge_clock(slow, Reporter("hosts", "node-a")).verdict == "ok"


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7, 8])
def test_rounds_hold_each_pair_once_and_no_rank_twice(num_ranks: int) -> None:
    rounds = plan_rounds(num_ranks)
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert sorted(map(sorted, pairs)) == [list(pair) for pair in combinations(range(num_ranks), 2)]
    assert all(len({*sum(pairs, ())}) == 2 * len(pairs) for pairs in rounds)


def test_a_pair_that_is_slow_beside_the_others_is_warned_about() -> None:
    def rows(speed: float, latency: float = 1e-4) -> list[list[float]]:
        return [[4096, latency, 20], [1 << 24, (1 << 24) / speed, 5]]

    speeds = {"a - b": 1e9, "a - c": 0.2e9, "b - c": 1.1e9}
    found = {str(f.host): f for f in judge_pairs({n: rows(s) for n, s in speeds.items()}, "gloo")}
    assert {name: finding.verdict for name, finding in found.items()} == {
        "a - b": "ok", "a - c": "warn", "b - c": "ok",
    }  # fmt: skip
    assert f"{statistics.median(speeds.values()) / 1e9:.2f} GB/s" in str(found["a - c"].advice)
    assert found["a - c"].values["bytes_per_second"] == pytest.approx(0.2e9)
    (slow,) = judge_pairs({"a - b": rows(20e6)}, "gloo")
    (far,) = judge_pairs({"a - b": rows(1e9, latency=0.02)}, "gloo")
    assert slow.verdict == far.verdict == "warn"


@pytest.mark.slow
def test_two_processes_that_do_not_meet_give_up(tmp_path: Path) -> None:
    with Link(None) as alone, pytest.raises(HostError, match="no answer about all_reduce in 4 s"):
        alone.ask(
            "all_reduce", seconds=4, rank=0, address="127.0.0.1", port=free_port(),
            backend="gloo", sizes=[4096],
        )  # fmt: skip


def test_an_interface_that_does_not_exist_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with Link(None) as link:
        answer = link.ask("network", names=[])
    findings = {finding.name: finding for finding in judge_networks({None: answer})}
    assert findings["interfaces"].verdict == "fail"
    assert findings["interfaces"].found.startswith("eth77 does not exist")
    assert "lo" in str(findings["interfaces"].advice)


NETWORK = {
    "hostname": "node-a",
    "resolved": {"node-a": ["127.0.1.1"], "node-b": []},
    "interfaces": {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth0": ["10.0.0.5"]},
    "bindable": ["127.0.1.1"],
    "chosen": {},
    "reverse_seconds": {"10.0.0.6": 10.01, "10.0.0.5": 0.0},
}
"""A host as Debian installs it: its own name on loopback, and here a DNS server that is silent."""


def test_a_name_on_loopback_is_warned_about_where_other_hosts_must_reach_it() -> None:
    other = NETWORK | {"hostname": "node-b", "resolved": {"node-b": ["10.0.0.6"], "node-a": []}}
    findings = list(judge_networks({None: other, "node-a": NETWORK}))
    about = {f.name: f for f in findings if f.host == "node-a"}
    assert about["interfaces"].verdict == "warn"
    assert "GLOO_SOCKET_IFNAME=eth0" in str(about["interfaces"].advice)
    assert about["names"].verdict == "fail"
    assert "node-b" in about["names"].found
    assert nccl_interface(NETWORK) == "eth0"


def test_a_dns_server_that_is_silent_is_warned_about() -> None:
    finding = reverse(NETWORK, Reporter("network"))
    assert (finding.verdict, finding.found) == ("warn", "10.0.0.6 takes 10.0 s")
    assert "/etc/nsswitch.conf" in str(finding.advice)


def test_devices_that_torch_cannot_use_fail() -> None:
    answer = {
        "torch": "2.13.0+cpu", "cuda": None, "listed": ["NVIDIA H100, 550.54"], "is_hidden": False,
        "usable": [], "nccl": None, "has_gloo": True,
    }  # fmt: skip
    report = Reporter("device")
    assert judge_device(answer, report).verdict == "fail"
    assert judge_device(answer | {"is_hidden": True}, report).verdict == "ok"
    whole = answer | {"usable": ["NVIDIA H100"], "cuda": "12.8", "nccl": [2, 27, 3]}
    assert judge_device(whole, report).found == (
        "1 x NVIDIA H100, driver 550.54, CUDA 12.8, NCCL 2.27.3"
    )
    assert choose_backend([whole, whole], on_one_host=False) == "nccl"
    # NCCL refuses two ranks on one GPU.
    assert choose_backend([whole, whole], on_one_host=True) == "gloo"
    findings = {f.name: f for f in judge_devices({"node-a": whole}, {"node-a": 4})}
    assert (findings["slots"].verdict, findings["slots"].found) == ("fail", "4 slots, 1 GPUs")
    (unequal,) = (
        finding
        for finding in judge_devices({"node-a": whole, "node-b": answer}, {})
        if finding.name == "same devices"
    )
    assert unequal.verdict == "warn"


@pytest.mark.parametrize(
    ("environment", "has_file", "verdict"),
    [
        ({}, False, "ok"),
        ({}, True, "warn"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "ok"),
        ({"RAY_AUTH_MODE": "token"}, True, "ok"),
        ({"RAY_AUTH_MODE": "token"}, False, "fail"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123"}, False, "ok"),
    ],
)
def test_the_half_on_token_of_ray_is_told(
    environment: dict[str, str], has_file: bool, verdict: str, tmp_path: Path
) -> None:
    if has_file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("0123")
    finding = judge_token({"HOME": str(tmp_path), **environment})
    assert finding.verdict == verdict
    assert "0123" not in finding.found + str(finding.advice)


def test_ray_nodes_without_cpus_or_with_little_room_are_told() -> None:
    head = {"node_ip": "10.0.0.1", "state": "ALIVE",
            "resources_total": {"object_store_memory": 5e7}}  # fmt: skip
    lost = {"node_ip": "10.0.0.2", "state": "DEAD", "resources_total": {}}
    worker = {"node_ip": "10.0.0.3", "state": "ALIVE",
              "resources_total": {"CPU": 4.0, "object_store_memory": 2e9}}  # fmt: skip
    assert [f.verdict for f in judge_nodes([head])] == ["fail", "warn"]
    nodes, stores = judge_nodes([head, lost, worker])
    assert (nodes.verdict, nodes.found) == ("warn", "2 alive, 4 CPUs, 0 GPUs; dead: 10.0.0.2")
    assert stores.values == {"smallest_bytes": 5e7}


def test_a_server_that_is_no_ray_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        started = time.monotonic()
        _, finding = examine_ray(address, {"HOME": str(tmp_path)})
    assert time.monotonic() - started < 60
    assert (finding.name, finding.verdict) == ("address", "fail")
    assert "timed out" in finding.found


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("sqlite:///{}/new.db", "will be made at the first sync"),
        ("sqlite:///{}/text.db", "file is not a database"),
        ("file://{}/mlruns", "is no store"),
        ("postgresql+psycopg2://me:secret-1@127.0.0.1:1/runs", "refused"),
        ("http://me:secret-1@127.0.0.1:1", "refused"),
    ],
)
def test_a_store_is_judged_without_its_password(uri: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database, but quite a long text in its place" * 9)
    (finding,) = examine_mlflow(uri.format(tmp_path), {})
    assert found in finding.found
    assert finding.verdict == ("ok" if "new" in uri else "fail")
    assert "secret-1" not in finding.found + str(finding.advice)


def test_advice_stands_below_its_finding_within_the_width() -> None:
    advice = "set GLOO_SOCKET_IFNAME=eth0 on every host, " * 6
    finding = Finding(
        subject="network", name="interfaces", verdict="warn", found="gloo lo", advice=advice,
        host="node-a",
    )  # fmt: skip
    lines = list(lines_of(finding, 100, None))
    assert lines[:2] == ["network", "  warn  interfaces       node-a: gloo lo"]
    assert lines[2].lstrip().startswith("-> set GLOO")
    assert max(map(len, lines)) <= 100
    assert len(lines) > 3
    assert list(lines_of(finding, 100, "network")) == lines[1:]
