"""A Ray address that nobody answers is named at once; surroundings are put back."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pipeline
from pipeline.config.data import DataConfig
from pipeline.data.ray_surroundings import check_answers, environment_set
from pipeline.errors import LaunchError

WITHOUT_CLUSTER = """
import sys
from pipeline.config.data import DataConfig
from pipeline.data.prepare import prepare
from pipeline.data.ray_tasks import ray_session
from pipeline.errors import LaunchError

try:
    prepare(DataConfig.model_validate_json(sys.argv[1]))
except LaunchError as exc:
    print(exc)
try:
    with ray_session("nonsense"):
        pass
except LaunchError as exc:
    print(exc)
"""


@pytest.fixture
def silent_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_nobody_answers_is_named_with_a_remedy(
    silent_port: int, scheme: str
) -> None:
    address = f"{scheme}127.0.0.1:{silent_port}"
    with pytest.raises(LaunchError, match=f"cluster at {address}: .*refused.*`ray start --head`"):
        check_answers(address)


@pytest.mark.parametrize("address", ["auto", "ray://head", "anyscale://place", "[::1]"])
def test_an_address_without_host_and_port_is_left_to_ray(address: str) -> None:
    check_answers(address)


def test_an_address_that_somebody_answers_passes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_answers(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.slow
def test_preparation_tells_of_the_cluster_and_leaves_no_manifest(
    tmp_path: Path,
    silent_port: int,
    make_documents: Callable[[int], list[dict[str, str]]],
    write_jsonl: Callable[..., Path],
    make_config: Callable[..., DataConfig],
) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", make_documents(20))
    config = make_config(path, tmp_path / "prepared")
    address = f"127.0.0.1:{silent_port}"
    started = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-c", WITHOUT_CLUSTER, config.model_dump_json()],
        cwd=Path(pipeline.__file__).parents[1],
        env=os.environ | {"RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    # Ray alone takes minutes.
    assert time.monotonic() - started < 30
    of_prepare, of_session = shown.stdout.splitlines()
    assert of_prepare.startswith(f"cannot reach the Ray cluster at {address}: ")
    assert of_session.startswith("cannot reach the Ray cluster at nonsense: ")
    assert not list((tmp_path / "prepared").rglob("manifest.json"))


def test_variables_are_put_back_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "before")
    monkeypatch.delenv("MADE", raising=False)
    with environment_set({"KEPT": "inside", "MADE": "inside"}):
        assert (os.environ["KEPT"], os.environ["MADE"]) == ("inside", "inside")
    assert os.environ["KEPT"] == "before"
    assert "MADE" not in os.environ
