"""The process that replays to MLflow ends with the command that started it."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = """
import os, signal, sys, time
from pathlib import Path
from launch.sync_process import SyncProcess

directory = Path(sys.argv[1])
process = SyncProcess(directory, f"sqlite:///{directory}/mlflow.db")
while "following" not in (directory / "sync.log").read_text():
    time.sleep(0.05)
with process.paused():
    print(process._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_command_killed_in_a_timed_cell_leaves_no_process_behind(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    sync = psutil.Process(int(shown.stdout))
    try:
        deadline = time.monotonic() + 30
        while is_alive(sync) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_alive(sync)
    finally:
        if sync.is_running():
            sync.kill()


def is_alive(process: psutil.Process) -> bool:
    # Whose parent has died is reaped by the first process of the machine, if at all.
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
