"""Hostfiles are read strictly: DeepSpeed alone would fall back to this machine."""

from pathlib import Path

import pytest

from launch.hostfile import HostfileLauncher, read_hostfile
from launch.stopping import StopRequest
from pipeline.config.cluster import ClusterConfig
from pipeline.errors import ConfigError


def test_slots_are_read_by_host(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two machines\nnode-a slots=4\n\nnode-b slots=2  # small\n")
    assert read_hostfile(path) == {"node-a": 4, "node-b": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no host"),
        ("node-a slots=0", ":1: 'node-a slots=0' is not of the form"),
        ("node-a slots=1\nnode-b", ":2: 'node-b' is not of the form"),
        ("node-a slots=1\nnode-a slots=1", ":2: host node-a stands twice"),
    ],
)
def test_a_wrong_hostfile_is_refused_by_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert message in str(caught.value)


def test_ranks_and_slots_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("node-a slots=4\nnode-b slots=2\n")
    launcher = HostfileLauncher(
        ClusterConfig(launcher="hostfile", hostfile=path), StopRequest(print)
    )
    with pytest.raises(ConfigError, match="nearest: num_workers=6"):
        launcher.command(tmp_path, num_workers=2)
    assert launcher.command(tmp_path, num_workers=6)[:3] == ["deepspeed", "--hostfile", str(path)]
