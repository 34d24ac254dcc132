"""A Ray cluster over several hosts takes jobs from outside, and survives a host without power."""

import json
import os
import re
import secrets
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.tracking.events import Event, read_events
from pipeline.tracking.store import read_result
from tests.hosts.machines import BIN, ROOT, Machine
from tests.hosts.runs import local_losses, losses_of, new_run

pytestmark = [pytest.mark.netns, pytest.mark.slow]

HOSTS = ["head", "node1", "node2", "node3"]
START_SECONDS = 90
JOB_SECONDS = 300
PORT = 6379
SMALL_STORE = ["--object-store-memory", "100000000", "--disable-usage-stats"]


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster on the hosts, and how a client outside of them reaches it."""

    hosts: dict[str, Machine]
    client: dict[str, str]

    @property
    def dashboard(self) -> str:
        return f"http://{self.hosts['head'].address}:8265"

    def submit(self, *arguments: str) -> list[str]:
        """Give the command of a job, as the README has it."""
        words = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard]
        return [*words, "--working-dir", ".", "--", "python", "-m", "launch", *arguments]


@pytest.fixture(scope="module")
def cluster(hosts: dict[str, Machine], tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A head without CPUs for ranks, three nodes of one CPU, and a token that all ask for."""
    logs = tmp_path_factory.mktemp("ray-logs")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    for host in hosts.values():
        host.variables.update(token)
    address = hosts["head"].address
    head = ["ray", "start", "--head", "--port", str(PORT), "--dashboard-host", "0.0.0.0"]
    start(hosts["head"], [*head, "--num-cpus", "0"], logs)
    joining = ["ray", "start", "--address", f"{address}:{PORT}", "--num-cpus", "1"]
    nodes = {name: begin(host, joining, logs) for name, host in hosts.items() if name != "head"}
    failed = [name for name, process in nodes.items() if process.wait() != 0]
    assert not failed, (logs / f"{failed[0]}.log").read_text()
    home = tmp_path_factory.mktemp("client")
    return Cluster(hosts, {"HOME": str(home), **token})


def begin(host: Machine, words: list[str], logs: Path) -> subprocess.Popen[bytes]:
    place = ["--node-ip-address", host.address, *SMALL_STORE]
    return host.start(["timeout", str(START_SECONDS), *words, *place], logs / f"{host.name}.log")


def start(host: Machine, words: list[str], logs: Path) -> None:
    assert begin(host, words, logs).wait() == 0, (logs / f"{host.name}.log").read_text()


def run_job(cluster: Cluster, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Submit a job from this machine, which is none of the hosts."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            cluster.submit(*arguments), cwd=ROOT, env=os.environ | cluster.client,
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
        )  # fmt: skip


def ray_train(run_dir: Path, *overrides: str) -> list[str]:
    words = ["train", str(run_dir), "--workers", "2", "cluster.accelerator=cpu"]
    return [*words, "cluster.placement=spread", *overrides]


def test_a_client_without_the_token_is_refused(cluster: Cluster) -> None:
    def answer(headers: dict[str, str]) -> int:
        request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as exc:
            return exc.code

    assert answer({}) == 401
    assert answer({"Authorization": "Bearer wrong"}) == 403
    assert answer({"Authorization": f"Bearer {cluster.client['RAY_AUTH_TOKEN']}"}) == 200


def test_a_job_from_outside_trains_on_two_nodes_as_one_machine_does(
    cluster: Cluster, tiny_run: Path, tmp_path: Path
) -> None:
    run_dir = new_run(tiny_run, "ray-lstm", "lstm_attention", 3)
    job = run_job(cluster, tmp_path / "job.log", *ray_train(run_dir))
    assert job.wait(timeout=JOB_SECONDS) == 0, (tmp_path / "job.log").read_text()[-4000:]
    result = read_result(run_dir)
    assert (result.family, result.zero_stage, result.world_size) == ("lstm_attention", 3, 2)
    assert len(hosts_of(run_dir)) == 2
    assert "head" not in hosts_of(run_dir)
    expected = local_losses(tiny_run, "ray-lstm-local", "lstm_attention", 3)
    assert losses_of(run_dir) == expected


def hosts_of(run_dir: Path) -> set[str]:
    """Hosts on which ranks of the last attempt ran."""
    return {json.loads(path.read_text())["host"] for path in run_dir.glob("rank-*.json")}


def test_a_node_that_does_not_see_the_storage_is_named_before_the_start(
    cluster: Cluster, tiny_run: Path
) -> None:
    run_dir = new_run(tiny_run, "ray-storage", "gpt", 1)
    address = f"cluster.ray_address={cluster.hosts['head'].address}:{PORT}"
    words = ["python", "-m", "launch", *ray_train(run_dir, address), "--launcher", "ray"]
    with cluster.hosts["node2"].without(run_dir):
        shown = cluster.hosts["head"].run(words, timeout_seconds=JOB_SECONDS)
    assert shown.returncode == 1, shown.stdout + shown.stderr
    assert f"node2 does not see the run directory {run_dir}" in shown.stderr
    assert "node1 does not" not in shown.stderr
    assert not (run_dir / "events.jsonl").exists()


def test_a_run_survives_a_host_without_power_and_ends_with_the_same_losses(
    cluster: Cluster, tiny_run: Path, tmp_path: Path
) -> None:
    interval = 10
    more = [
        "train.total_tokens=61440", "train.global_batch_tokens=1024",
        f"checkpoint.every_steps={interval}",
    ]  # fmt: skip
    run_dir = new_run(tiny_run, "ray-power", "gpt", 1, *more)
    log = tmp_path / "job.log"
    job = run_job(cluster, log, *ray_train(run_dir))
    lost = wait_for_step(run_dir, 25, job)
    victim = next(name for name in sorted(hosts_of(run_dir)))
    cluster.hosts[victim].power_off()
    assert job.wait(timeout=JOB_SECONDS) == 0, log.read_text()[-4000:]

    events = read_events(run_dir / "events.jsonl")
    last_before = [event.step for event in events if event.attempt == 1][-1]
    assert 25 <= lost <= last_before < 60, "the host was to go in mid-run"
    resumed = next(event for event in events if event.kind == "resume")
    assert 0 <= last_before - resumed.step <= interval
    assert victim not in hosts_of(run_dir)
    assert len(hosts_of(run_dir)) == 2
    failures = [json.loads(line) for line in (run_dir / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == 1
    assert re.match(rf"rank \d of ray-power on {victim} after step \d+", failures[0]["message"])
    assert failures[0]["message"] in log.read_text()
    assert read_result(run_dir).attempts == 2
    assert losses_of(run_dir) == local_losses(tiny_run, "ray-power-local", "gpt", 1, *more)


def wait_for_step(run_dir: Path, step: int, job: subprocess.Popen[bytes]) -> int:
    """Wait until a run has logged a step, and give the newest it has logged."""
    deadline = time.monotonic() + JOB_SECONDS
    while time.monotonic() < deadline and job.poll() is None:
        events: list[Event] = read_events(run_dir / "events.jsonl")
        if events and events[-1].step >= step:
            return events[-1].step
        time.sleep(0.02)
    raise AssertionError(f"the run did not come to step {step}; job: {job.poll()}")
