"""A study submitted as a Ray job leaves everything behind when job and cluster are gone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launch.doctor_ray import examine_ray
from launch.environment import free_port
from pipeline.tracking.store import read_runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

STEPS = 200
"""Enough for the model to do better than the frequencies of the tokens, which the study checks."""


@dataclass(frozen=True)
class Cluster:
    process: subprocess.Popen[bytes]
    dashboard: str
    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Ray head of its own: ports, home and a directory short enough for its sockets."""
    directory = Path(tempfile.mkdtemp(prefix="r"))
    home = tmp_path_factory.mktemp("ray-home")
    environment = os.environ | {
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        # At its end the head would wait for replicas of a service, which nobody runs here.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    ports = {
        name: str(free_port())
        for name in (
            "--port", "--dashboard-port", "--dashboard-agent-listen-port",
            "--dashboard-agent-grpc-port", "--metrics-export-port", "--ray-client-server-port",
        )
    }  # fmt: skip
    options = [word for pair in ports.items() for word in pair]
    options += ["--temp-dir", str(directory), "--node-ip-address", "127.0.0.1", "--num-cpus", "2"]
    options += ["--object-store-memory", "100000000", "--disable-usage-stats"]
    with (home / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", *options],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    dashboard = f"http://127.0.0.1:{ports['--dashboard-port']}"
    try:
        wait_until_jobs_are_taken(dashboard, process, home / "ray.log")
        yield Cluster(process, dashboard, f"127.0.0.1:{ports['--port']}", environment)
    finally:
        stop(process)


def wait_until_jobs_are_taken(dashboard: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the Ray head did not come up:\n{log.read_text()[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_submit_streams_the_job_and_passes_its_exit_code_on(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "launch", "submit", "train", "configs/run/gpt.yaml"]
    command += ["--address", cluster.dashboard]
    shown = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert shown.returncode == 2, shown.stdout + shown.stderr
    assert "working directory vanishes with the job" in shown.stdout


def test_doctor_finds_the_nodes_behind_either_address(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    deadline = time.monotonic() + 60
    while "object stores" not in {f.name for f in examine_ray(cluster.dashboard, os.environ)}:
        assert time.monotonic() < deadline, "the head did not join its own cluster"
        time.sleep(0.5)
    for address in (cluster.dashboard, cluster.address):
        findings = {f.name: f for f in examine_ray(address, cluster.environment)}
        assert {finding.verdict for finding in findings.values()} == {"ok"}, findings
        assert findings["nodes"].values == {"cpus": 2.0, "gpus": 0.0}
        assert findings["object stores"].values == {"smallest_bytes": 1e8}


def test_a_submitted_study_leaves_results_report_and_mlflow_behind(
    cluster: Cluster, migrated_store: Path, tmp_path: Path
) -> None:
    shutil.copy(migrated_store, tmp_path / "mlflow.db")
    study = write_study(tmp_path)
    command = [BIN / "ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", "."]
    command += ["--", "python", "-m", "launch", "study", study]
    job = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-2000:]
    assert "launcher ray" in job.stdout
    stop(cluster.process)

    (record,) = read_runs(tmp_path / "submitted")
    assert (record.result.steps, record.result.world_size) == (STEPS, 1)
    assert json.loads((tmp_path / "submitted" / "result.json").read_text())["status"] == "complete"
    assert "<html" in (tmp_path / "submitted" / "report.html").read_text()[:200]
    check_tracking(tmp_path / "mlflow.db")


def write_study(output_dir: Path) -> Path:
    """One cell on one rank: two ranks and two families under Ray are shown by other tests."""
    study = {
        "name": "submitted",
        "output_dir": str(output_dir),
        "base": {
            "data": {"tokenizer": {"vocab_size": 300}},
            "train": {
                "sequence_tokens": 32,
                "micro_batch_samples": 8,
                "global_batch_tokens": 256,
                "total_tokens": STEPS * 256,
                "optimizer": {"learning_rate": 0.02},
            },
            "eval": {"every_steps": None, "max_tokens": 4096},
        },
        "families": {"gpt": {"model": {"family": "gpt", "width": 32, "depth": 1, "heads": 2}}},
        "cluster": {"num_workers": 1},
    }
    path = output_dir / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def check_tracking(database: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    experiments = [item.experiment_id for item in client.search_experiments()]
    found = client.search_runs(experiments)
    parents = {run.data.tags.get("mlflow.parentRunId") for run in found}
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    # The run, and the summary of its family.
    assert len(children) == 2
    assert {run.info.run_id for run in found} & parents
    trained = [run for run in children if "eval/loss" in run.data.metrics]
    assert len(trained) == 1
    assert {run.info.status for run in found} == {"FINISHED"}
