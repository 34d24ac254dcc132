"""Ranks elsewhere get the variables they read from a file that nobody else can read."""

import os
import stat
from pathlib import Path

import pytest

from launch.rank_environment import FILE, rank_environment_file, take_rank_environment


def test_the_file_holds_what_ranks_read_is_private_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-planted-token")
    monkeypatch.setenv("PATH", "/here/bin")
    (tmp_path / FILE).write_text("left by a launcher that was killed")
    with rank_environment_file(tmp_path):
        assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
        assert "a-planted-token" not in (tmp_path / FILE).read_text()
        monkeypatch.delenv("NCCL_SOCKET_IFNAME")
        monkeypatch.setenv("PATH", "/usr/bin")
        take_rank_environment(tmp_path)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
    assert os.environ["PATH"] == "/here/bin:/usr/bin"
    assert not (tmp_path / FILE).exists()


def test_what_a_host_sets_itself_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    with rank_environment_file(tmp_path):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ens3")
        take_rank_environment(tmp_path)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ens3"


def test_a_file_cannot_set_what_no_rank_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("DS_PLANTED", raising=False)
    (tmp_path / FILE).write_text('{"LD_PRELOAD": "/tmp/evil.so", "DS_PLANTED": "1"}')
    take_rank_environment(tmp_path)
    assert "LD_PRELOAD" not in os.environ
    assert os.environ.pop("DS_PLANTED") == "1"


def test_without_a_file_nothing_changes(tmp_path: Path) -> None:
    before = dict(os.environ)
    take_rank_environment(tmp_path)
    assert dict(os.environ) == before
