"""What a submitted job is told by its environment."""

import subprocess
from pathlib import Path

import pytest

from launch.environment import free_port
from launch.ray_job import job_environment, submit
from pipeline.errors import LaunchError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the commit of a checkout")
def test_a_job_is_told_the_commit_it_was_shipped_from() -> None:
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert job_environment()["TANDEM_GIT_COMMIT"] == head.stdout.strip()


def test_a_job_gets_the_output_directory_and_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_OUTPUT", "/shared/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-planted-token")
    variables = job_environment()
    assert variables["TANDEM_OUTPUT"] == "/shared/runs"
    assert "a-planted-token" not in variables.values()


def test_the_address_that_is_given_wins_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, other = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    monkeypatch.setenv("RAY_ADDRESS", other)
    with pytest.raises(LaunchError, match="cannot submit") as caught:
        submit("true", given, print)
    assert given in str(caught.value.__cause__)
    assert other not in str(caught.value.__cause__)
