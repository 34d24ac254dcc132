"""A run leaves hosts that are cut off or told to go, and stops where none is left."""

import json
from pathlib import Path

import pytest

from pipeline.tracking.events import read_events
from pipeline.tracking.store import read_result, read_verdict
from pipeline.training.checkpoint_files import list_checkpoints
from tests.chaos.harness import history
from tests.hosts.machines import Machine
from tests.hosts.ray_hosts import (
    JOB_SECONDS,
    Cluster,
    hosts_of,
    records_of,
    slow_down,
    wait_for_step,
)
from tests.hosts.runs import local_golden, new_run

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.long]

HOSTS = ["head", "node1", "node2", "node3"]
NUM_STEPS = 60
INTERVAL = 10
LENGTH = [f"train.total_tokens={NUM_STEPS * 1024}", "train.global_batch_tokens=1024"]
NOTICED_SOON = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""As docs/clusters.md has it: a silent host is noticed after about 12 s, and not after 65."""


@pytest.fixture(scope="module")
def cluster(hosts: dict[str, Machine], tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A head and three nodes."""
    return Cluster.started(hosts, tmp_path_factory, **NOTICED_SOON)


def test_a_run_goes_on_without_a_host_whose_cable_is_cut(
    cluster: Cluster, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*LENGTH, f"checkpoint.every_steps={INTERVAL}"]
    run_dir = new_run(tiny_run, "ray-cable", "gpt", 1, *more)
    slow_down(run_dir, {1: (range(20, NUM_STEPS), 0.2)})
    log = tmp_path / "job.log"
    job = cluster.submit(log, run_dir)
    wait_for_step(run_dir, 25, job)
    # The host of rank 0, which alone writes events and commits checkpoints.
    (victim,) = [record["host"] for record in records_of(run_dir) if record["rank"] == 0]
    with cluster.hosts[victim].unplugged():
        assert job.wait(timeout=JOB_SECONDS) == 0, log.read_text()[-4000:]

    assert victim not in hosts_of(run_dir)
    result = read_result(run_dir)
    assert (result.attempts, result.world_size) == (2, 2)
    events = read_events(run_dir / "events.jsonl")
    last_before = [event.step for event in events if event.attempt == 1][-1]
    resumed = next(event for event in events if event.kind == "resume")
    assert 25 <= last_before < NUM_STEPS
    assert 0 <= last_before - resumed.step <= INTERVAL
    failures = [json.loads(line) for line in (run_dir / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == 1
    assert victim in failures[0]["message"]
    seen = history(run_dir, [])
    golden = local_golden(new_run(tiny_run, "ray-cable-golden", "gpt", 1, *more), monkeypatch)
    assert seen.samples == golden.samples
    assert seen.losses == golden.losses


def test_a_run_stops_where_ray_is_told_that_all_its_nodes_will_go(
    cluster: Cluster, tiny_run: Path, tmp_path: Path
) -> None:
    run_dir = new_run(tiny_run, "ray-drain", "gpt", 1, *LENGTH)
    slow_down(run_dir, dict.fromkeys((1, 2), (range(10, NUM_STEPS), 2.0)))
    log = tmp_path / "job.log"
    job = cluster.submit(log, run_dir, "cluster.min_workers=1", "cluster.wait_seconds=2")
    wait_for_step(run_dir, 10, job)
    first, last = sorted(hosts_of(run_dir))
    cluster.drain(run_dir, first)
    wait_for_step(run_dir, 10, job, attempt=2)
    assert hosts_of(run_dir) == {last}
    cluster.drain(run_dir, last)
    assert job.wait(timeout=JOB_SECONDS) != 0

    text = log.read_text()
    assert "exit code 75" in text, text[-4000:]
    assert f"Ray is told that {first} will leave" in text
    assert f"Ray is told that {last} will leave" in text
    assert read_verdict(run_dir) == "stopped"
    assert not (run_dir / "failures.jsonl").exists()
    events = read_events(run_dir / "events.jsonl")
    stops = [event.step for event in events if event.kind == "stop"]
    begun = [event for event in events if event.kind in ("start", "resume")]
    assert [event.values["world_size"] for event in begun] == [2, 1]
    assert [event.step for event in begun] == [0, stops[0]]
    taken = [event.step for event in events if event.kind == "train"]
    assert taken == list(range(1, stops[1] + 1)), "a step was taken twice, or none"
    assert list_checkpoints(run_dir)[0].name == f"step-{stops[1]:08d}"
