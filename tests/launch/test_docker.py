"""The image and the compose file, checked for what can be checked without a Docker engine."""

import re
import shlex
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


def test_base_image_has_a_ray_of_the_stated_range_and_a_python_that_the_project_takes() -> None:
    versions = re.findall(r"rayproject/ray:([\d.]+)-py(\d+)", DOCKERFILE)
    assert versions
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ray_range = next(Requirement(line).specifier for line in stated if line.startswith("ray["))
    for ray_version, python in versions:
        assert ray_range.contains(ray_version)
        assert python == "311"


def test_every_copied_path_exists() -> None:
    sources = []
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY"):
            sources += [word for word in shlex.split(line)[1:-1] if not word.startswith("--")]
    assert sources
    assert [path for path in sources if not (ROOT / path).exists()] == []


def test_ports_are_published_on_loopback_only() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_ray_nodes_demand_a_token_from_the_environment() -> None:
    for name in ("head", "worker"):
        environment = COMPOSE["services"][name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


def test_all_services_share_the_run_directory() -> None:
    for service in COMPOSE["services"].values():
        assert "runs:/runs" in service["volumes"]
