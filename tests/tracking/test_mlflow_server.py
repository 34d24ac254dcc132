"""A real MLflow server on loopback that is down at first, then up."""

import importlib.metadata
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.doctor_mlflow import examine_mlflow
from pipeline.errors import TrackingError
from pipeline.tracking.events import read_events
from pipeline.tracking.mlflow_client import connected, default_uri
from pipeline.tracking.mlflow_sync import follow, sync
from pipeline.tracking.mlflow_ui import ENVIRONMENT, ui_command

pytestmark = pytest.mark.slow

START_SECONDS = 90.0
"""Loading the server takes 5 s on an idle machine."""


class Server:
    """The command of the command line's `ui`, run from a directory of its own."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, uri: str) -> None:
        with (self.directory / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                ui_command(uri, self.port),
                cwd=self.directory,
                env={**os.environ, **ENVIRONMENT},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.is_up():
            assert time.monotonic() < deadline, (self.directory / "server.log").read_text()
            time.sleep(0.1)

    def is_up(self) -> bool:
        try:
            return bool(self.get("/health"))
        except urllib.error.URLError:
            return False

    def get(self, path: str, host: str | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, headers={"Host": host} if host else {})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return bytes(opener.open(request, timeout=10).read())

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(timeout=30)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # A loaded machine answers late; what is tested here is a server that does not answer at all.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    directory = tmp_path / "server"
    directory.mkdir()
    server = Server(directory)
    yield server
    server.stop()


def test_a_server_that_was_down_gets_everything_when_it_is_up(
    make_run: Callable[..., object], make_study: Callable[[], Path], server: Server
) -> None:
    study_dir = make_study()
    uri = default_uri(study_dir.parent)
    run = make_run("alone").add("start", 0).add_steps(10, 50)
    started = time.monotonic()
    with pytest.raises(TrackingError, match=f"tracking store {server.url}: .*refused"):
        sync(run.path, server.url)
    assert time.monotonic() - started < 30, "a dead server must not hold a sync for minutes"

    stop, said, outcome = threading.Event(), [], []
    follower = threading.Thread(
        target=lambda: outcome.append(
            follow(
                run.path,
                server.url,
                interval_seconds=0.2,
                should_stop=stop.is_set,
                on_event=said.append,
            )
        )
    )
    follower.start()
    try:
        # The study's store is made while the run's follower finds no server.
        sync(study_dir)
        run.add_steps(60, 200)
        server.start(uri)
        run.finish()
    finally:
        stop.set()
        follower.join()
    assert outcome == [True]
    assert [line.partition(",")[0] for line in said[:1]] == ["tracking is behind"]
    assert said[1:] == ["tracking is back; nothing was lost"]

    with connected(server.url, print) as client:
        experiment = client.get_experiment_by_name("tandem/runs")
        (shown,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(shown.info.run_id, "train/loss")
        study = client.get_experiment_by_name("tandem/tiny")
        (parent,) = client.search_runs([study.experiment_id], "tags.role = 'study'")
    logged = read_events(run.path / "events.jsonl")
    assert [(m.step, m.value) for m in history] == [
        (event.step, event.metrics["train/loss"]) for event in logged if event.kind == "train"
    ]
    assert sync(run.path, server.url) == 0

    for run_id, name, path in (
        (shown.info.run_id, "run.yaml", run.path),
        (parent.info.run_id, "report.html", study_dir),
    ):
        page = server.get(f"/get-artifact?path={name}&run_uuid={run_id}")
        assert page == (path / name).read_bytes()
    for path in ("../../../../../../etc/passwd", "%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="40"):
            server.get(f"/get-artifact?path={path}&run_uuid={parent.info.run_id}")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        server.get("/api/2.0/mlflow/experiments/search?max_results=1", host="evil.example")
    check_doctor(server)
    assert [path.name for path in server.directory.iterdir()] == ["server.log"]


def check_doctor(server: Server) -> None:
    found = {finding.name: finding for finding in examine_mlflow(server.url, {})}
    assert {finding.verdict for finding in found.values()} == {"ok"}
    assert f"the client here is {importlib.metadata.version('mlflow')}" in (
        found["server version"].found
    )
    # Loopback under a name that the server was not told: 127.0.0.1 in hexadecimal.
    found = {f.name: f for f in examine_mlflow(f"http://0x7f000001:{server.port}", {})}
    assert found["server"].verdict == "fail"
    assert found["server"].found.endswith(f"refuses the name 0x7f000001:{server.port} (403)")
    assert "--allowed-hosts" in str(found["server"].advice)
