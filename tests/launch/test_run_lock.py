"""Two commands never work in one directory, and a killed one does not block the next."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.run_lock import alone_in
from pipeline.errors import LaunchError

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, sys, time
from pathlib import Path
from launch.run_lock import alone_in

with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_command_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LaunchError, match=f"another command .*process {holder.pid} on"):
            enter(tmp_path)
        holder.send_signal(signal.SIGKILL)
    enter(tmp_path)


@pytest.mark.slow
def test_the_train_command_is_refused_beside_another(cli, tiny_run: Path, tmp_path: Path) -> None:
    shards = tiny_run.parent / "runs" / "data"
    overrides = [f"output_dir={tmp_path}", f"data.output_dir={shards}"]
    assert cli("init", tiny_run, *overrides).code == 0
    with alone_in(tmp_path / "tiny"):
        shown = cli("train", tiny_run, *overrides)
    assert shown.code == 1
    assert "another command works in" in shown.err
    assert not (tmp_path / "tiny" / "events.jsonl").exists()


def enter(directory: Path) -> None:
    with alone_in(directory):
        assert (directory / ".lock").exists()
