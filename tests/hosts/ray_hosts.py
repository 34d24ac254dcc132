"""A Ray cluster over test hosts: how a client outside of them gives it jobs, and how nodes go."""

import json
import os
import secrets
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from pipeline.tracking.events import read_events
from pipeline.training.faults import ALLOW_VARIABLE, PLAN_VARIABLE
from tests.chaos.harness import plan_path
from tests.hosts.machines import BIN, ROOT, Machine

START_SECONDS = 120
JOB_SECONDS = 300
PORT = 6379
LEAN = ["--object-store-memory", "100000000", "--disable-usage-stats"]
LEAN += ["--include-log-monitor=False"]
"""No job here reads what the log monitor forwards, and it takes seconds of a core on every node."""
LEAN_VARIABLES = {"RAY_prestart_worker_first_driver": "0"}
"""A job brings an environment of its own, for which workers that were started before are no use."""


@dataclass(frozen=True)
class Cluster:
    """A head without CPUs for ranks, nodes of one CPU each, and a token that all ask for."""

    hosts: dict[str, Machine]
    client: dict[str, str]
    """Variables of a client on this machine, which is none of the hosts."""
    logs: Path

    @classmethod
    def started(
        cls,
        hosts: dict[str, Machine],
        tmp_path_factory: pytest.TempPathFactory,
        **variables: str,
    ) -> Self:
        """Start Ray on hosts, the head first, with variables of every login on them."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        for host in hosts.values():
            host.variables.update(token | LEAN_VARIABLES | variables)
        client = {"HOME": str(tmp_path_factory.mktemp("client")), **token}
        cluster = cls(hosts, client, tmp_path_factory.mktemp("ray-logs"))
        cluster.await_start(head=cluster.begin_head())
        nodes = [name for name in hosts if name != "head"]
        cluster.await_start(**{name: cluster.begin_node(name) for name in nodes})
        return cluster

    @property
    def head(self) -> Machine:
        return self.hosts["head"]

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:8265"

    def begin_head(self) -> subprocess.Popen[bytes]:
        words = ["--head", "--port", str(PORT), "--dashboard-host", "0.0.0.0", "--num-cpus", "0"]
        # No cloud gives or takes nodes.
        return self._begin(self.head, [*words, "--no-monitor"])

    def begin_node(self, name: str) -> subprocess.Popen[bytes]:
        words = ["--address", f"{self.head.address}:{PORT}", "--num-cpus", "1"]
        return self._begin(self.hosts[name], words)

    def _begin(self, host: Machine, words: list[str]) -> subprocess.Popen[bytes]:
        start = ["timeout", str(START_SECONDS), "ray", "start", *words, *LEAN]
        place = ["--node-ip-address", host.address]
        return host.start([*start, *place], self.logs / f"{host.name}.log")

    def await_start(self, **processes: subprocess.Popen[bytes]) -> None:
        """Wait for what `begin_head` and `begin_node` began, by name of host."""
        failed = [name for name, process in processes.items() if process.wait() != 0]
        assert not failed, (self.logs / f"{failed[0]}.log").read_text()

    def submit(self, log: Path, run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
        """Submit a job that trains on two nodes, as the README has it, with the run's fault plan.

        Args:
            log: Takes the job's output.
            run_dir: The run directory.
            overrides: More of the command's words.
        """
        variables = {PLAN_VARIABLE: str(plan_path(run_dir)), ALLOW_VARIABLE: "1"}
        words = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard]
        words += ["--runtime-env-json", json.dumps({"env_vars": variables}), "--working-dir", "."]
        words += ["--", "python", "-m", "launch", *ray_train(run_dir, *overrides)]
        with log.open("wb") as stream:
            return subprocess.Popen(
                words, cwd=ROOT, env=os.environ | self.client,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            )  # fmt: skip

    def drain(self, run_dir: Path, host: str) -> None:
        """Tell Ray, as a cloud does, that a node on which a rank runs will be taken away."""
        (node_id,) = {r["node_id"] for r in records_of(run_dir) if r["host"] == host}
        words = [
            "ray", "drain-node", "--address", f"{self.head.address}:{PORT}", "--node-id", node_id,
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back",
            "--deadline-remaining-seconds", "120",
        ]  # fmt: skip
        done = self.head.run(words, timeout_seconds=START_SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr


def ray_train(run_dir: Path, *overrides: str) -> list[str]:
    """Give the words after `python -m launch` that train on two nodes."""
    words = ["train", str(run_dir), "--workers", "2", "cluster.accelerator=cpu"]
    return [*words, "cluster.placement=spread", *overrides]


def slow_down(run_dir: Path, slow: dict[int, tuple[range, float]]) -> None:
    """Plan pauses, so that hosts have time to go and to come.

    Args:
        run_dir: The run directory.
        slow: Steps of an attempt, and the seconds that each of them waits.
    """
    faults = [
        {
            "id": f"slow-{attempt}-{step}", "attempt": attempt, "step": step, "rank": 0,
            "phase": "data.next", "action": "sleep", "args": {"seconds": seconds},
        }
        for attempt, (steps, seconds) in slow.items()
        for step in steps
    ]  # fmt: skip
    plan_path(run_dir).write_text(json.dumps(faults))


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """Give what the ranks of the last attempt said of themselves."""
    return [json.loads(path.read_text()) for path in sorted(run_dir.glob("rank-*.json"))]


def hosts_of(run_dir: Path) -> set[str]:
    """Hosts on which ranks of the last attempt ran."""
    return {record["host"] for record in records_of(run_dir)}


def wait_for_step(run_dir: Path, step: int, job: subprocess.Popen[bytes], attempt: int = 1) -> int:
    """Wait until an attempt of a run has logged a step, and give the newest it has logged."""
    deadline = time.monotonic() + JOB_SECONDS
    while time.monotonic() < deadline and job.poll() is None:
        events = [e for e in read_events(run_dir / "events.jsonl") if e.attempt == attempt]
        trained = [event.step for event in events if event.kind == "train"]
        if trained and trained[-1] >= step:
            return trained[-1]
        time.sleep(0.05)
    raise AssertionError(f"attempt {attempt} did not come to step {step}; job: {job.poll()}")


def wait_for_line(log: Path, words: str, job: subprocess.Popen[bytes]) -> None:
    """Wait until a job has said something."""
    deadline = time.monotonic() + JOB_SECONDS
    while time.monotonic() < deadline and job.poll() is None:
        if words in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"the job did not say {words!r}: {log.read_text()[-4000:]}")


def tracked_losses(server: str, name: str) -> dict[int, float]:
    """Give the loss of each step that an MLflow server shows for the finished run of this name."""
    experiments = ask(server, "POST", "experiments/search", {"max_results": 100})["experiments"]
    query = {"experiment_ids": [item["experiment_id"] for item in experiments]}
    found = ask(server, "POST", "runs/search", query)["runs"]
    (run,) = [run for run in found if run["info"]["run_name"] == name]
    assert run["info"]["status"] == "FINISHED"
    path = f"metrics/get-history?run_id={run['info']['run_id']}&metric_key=train/loss"
    points = ask(server, "GET", path)["metrics"]
    points.sort(key=lambda point: int(point["timestamp"]))
    return {int(point["step"]): float(point["value"]) for point in points}


def ask(server: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f"{server}/api/2.0/mlflow/{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)
