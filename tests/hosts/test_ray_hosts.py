"""A Ray cluster over several hosts takes jobs from outside, and survives hosts that go and come."""

import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking.events import read_events
from pipeline.tracking.store import read_result
from tests.chaos.harness import history
from tests.hosts.machines import Machine
from tests.hosts.ray_hosts import (
    JOB_SECONDS,
    PORT,
    Cluster,
    hosts_of,
    ray_train,
    slow_down,
    tracked_losses,
    wait_for_line,
    wait_for_step,
)
from tests.hosts.runs import local_golden, new_run

pytestmark = [pytest.mark.netns, pytest.mark.slow]

HOSTS = ["head", "node1", "node2"]
NUM_STEPS = 60
INTERVAL = 10


@pytest.fixture(scope="module")
def cluster(hosts: dict[str, Machine], tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A head and two nodes."""
    return Cluster.started(hosts, tmp_path_factory)


@pytest.fixture(scope="module")
def tracking_server(
    cluster: Cluster, migrated_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address, for clients outside, of an MLflow server on the head."""
    place = tmp_path_factory.mktemp("mlflow")
    shutil.copy(migrated_store, place / "mlflow.db")
    head = cluster.head
    # Ends with what started it, which could not end a process in there itself.
    server = ["setpriv", "--pdeathsig", "KILL", "mlflow", "server", "--host", "0.0.0.0"]
    server += ["--backend-store-uri", f"sqlite:///{place}/mlflow.db", "--port", "5000"]
    server += ["--artifacts-destination", f"{place}/artifacts"]
    server += ["--workers", "1", "--allowed-hosts", f"head:5000,{head.address}:5000"]
    # Its job runners would take 2 GB more.
    lean = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = head.start(server, place / "server.log", lean)
    yield f"http://{head.address}:5000"
    process.kill()
    process.wait()


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


def test_a_node_that_does_not_see_the_storage_is_named_before_the_start(
    cluster: Cluster, tiny_run: Path
) -> None:
    run_dir = new_run(tiny_run, "ray-storage", "gpt", 1)
    address = f"cluster.ray_address={cluster.head.address}:{PORT}"
    words = ["python", "-m", "launch", *ray_train(run_dir, address), "--launcher", "ray"]
    with cluster.hosts["node2"].without(run_dir):
        shown = cluster.head.run(words, timeout_seconds=JOB_SECONDS)
    assert shown.returncode == 1, shown.stdout + shown.stderr
    assert f"node2 does not see the run directory {run_dir}" in shown.stderr
    assert "node1 does not" not in shown.stderr
    assert not (run_dir / "events.jsonl").exists()


def test_a_job_from_outside_loses_a_host_takes_it_back_and_leaves_it_when_told(
    cluster: Cluster,
    tracking_server: str,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    length = [f"train.total_tokens={NUM_STEPS * 256}", "train.global_batch_tokens=256"]
    more = [*length, f"checkpoint.every_steps={INTERVAL}", "tracking.uri=http://head:5000"]
    run_dir = new_run(tiny_run, "ray-moves", "lstm_attention", 3, *more)
    # The first attempt is to lose a host in its midst, the second waits for it to be back, and the
    # third to be told.
    slow = {
        1: (range(25, NUM_STEPS), 0.2),
        2: (range(1, NUM_STEPS), 4.0),
        3: (range(1, NUM_STEPS), 4.0),
    }
    slow_down(run_dir, slow)
    log = tmp_path / "job.log"
    job = cluster.submit(log, run_dir, "cluster.min_workers=1")
    wait_for_step(run_dir, 25, job)
    assert hosts_of(run_dir) == {"node1", "node2"}
    cluster.hosts["node1"].power_off()
    wait_for_line(log, "ray-moves runs on 1 ranks", job)
    cluster.hosts["node1"].power_on()
    cluster.await_start(node1=cluster.begin_node("node1"))
    wait_for_step(run_dir, 1, job, attempt=3)
    assert hosts_of(run_dir) == {"node1", "node2"}
    cluster.drain(run_dir, "node1")
    assert job.wait(timeout=JOB_SECONDS) == 0, log.read_text()[-4000:]
    assert "Ray is told that node1 will leave" in log.read_text()
    assert hosts_of(run_dir) == {"node2"}
    result = read_result(run_dir)
    assert (result.attempts, result.family, result.zero_stage) == (4, "lstm_attention", 3)

    events = read_events(run_dir / "events.jsonl")
    begun = [event for event in events if event.kind in ("start", "resume")]
    assert [event.values["world_size"] for event in begun] == [2, 1, 2, 1]
    last_before = [event.step for event in events if event.attempt == 1][-1]
    assert 25 <= last_before < NUM_STEPS, "the host was to go in mid-run"
    lost, grown, left = (event.step for event in begun[1:])
    assert 0 <= last_before - lost <= INTERVAL
    assert lost < grown < left < NUM_STEPS
    taken = [event.step for event in events if event.kind == "train" and event.attempt > 1]
    assert taken == list(range(lost + 1, NUM_STEPS + 1)), "a move takes no step twice"
    failures = [json.loads(line) for line in (run_dir / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == 1
    assert re.match(r"rank \d of ray-moves on node1 after step \d+", failures[0]["message"])
    assert failures[0]["message"] in log.read_text()

    seen = history(run_dir, [])
    assert {line["attempt"] for line in seen.fired} == {1, 2, 3}, "the plan did not reach the ranks"
    unmoved = new_run(tiny_run, "ray-moves-golden", "lstm_attention", 3, *more)
    golden = local_golden(unmoved, monkeypatch)
    assert seen.samples == golden.samples
    same = range(1, lost + 1)
    assert [seen.losses[step] for step in same] == [golden.losses[step] for step in same]
    expected = as_numbers(golden.losses)
    assert as_numbers(seen.losses) == pytest.approx(expected, rel=1e-4)
    assert tracked_losses(tracking_server, "ray-moves") == as_numbers(seen.losses)


def as_numbers(losses: dict[int, str]) -> dict[int, float]:
    return {step: float.fromhex(loss) for step, loss in losses.items()}
