"""Ranks on this machine: how they fail, how they stop, and that none is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from launch import build_launcher
from launch.local import LocalLauncher
from launch.rank_logs import last_lines, log_path
from launch.run_dirs import init_run
from launch.stopping import STOP_FILE, StopRequest
from pipeline.config.cluster import ClusterConfig
from pipeline.config.load import load_run
from pipeline.data.prepare import prepare
from pipeline.errors import LaunchError
from pipeline.tracking.events import read_events
from pipeline.tracking.store import read_result, read_verdict

ROOT = Path(__file__).resolve().parents[2]
LONG = "train.total_tokens=12800000"


@pytest.fixture
def launcher() -> LocalLauncher:
    built = build_launcher(ClusterConfig(accelerator="cpu"), StopRequest(print))
    assert isinstance(built, LocalLauncher)
    return built


@pytest.fixture
def new_run(tiny_run: Path, request: pytest.FixtureRequest) -> Path:
    """A run of 100,000 steps, which no test waits for."""
    name = request.node.name.replace("[", "-").replace("]", "")[:60]
    return init_run(load_run(tiny_run, [f"name={name}", LONG]), prepare)


def ranks_below(pid: int) -> list[int]:
    """Process ids of running ranks, by rank: the fork server forks them in that order."""
    children = psutil.Process(pid).children(recursive=True)
    names = {child.pid: " ".join(child.cmdline()) for child in children}
    return sorted(
        child
        for child, name in names.items()
        if os.getsid(child) == child and "multiprocessing" in name
    )


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def trains(run_dir: Path) -> bool:
    return any(event.kind == "train" for event in read_events(run_dir / "events.jsonl"))


def wait_until(is_so: Callable[[], bool], timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.05)


@contextmanager
def interruptible_train(tiny_run: Path, name: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The train command in a process of its own, once its ranks are training."""
    overrides = [f"name={name}", LONG, "--workers", "2"]
    run_dir = load_run(tiny_run, overrides[:2]).output_dir / name
    command = [sys.executable, "-m", "launch", "train", str(tiny_run), *overrides]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: trains(run_dir))
            yield process, run_dir
        finally:
            process.kill()


def when_training(run_dir: Path, action: threading.Thread) -> None:
    """Start the action once the first step is done."""

    def wait() -> None:
        wait_until(lambda: trains(run_dir))
        action.start()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_is_named(
    launcher: LocalLauncher, new_run: Path, victim: int
) -> None:
    killed_at: list[float] = []

    def kill() -> None:
        killed_at.append(time.monotonic())
        os.kill(ranks_below(os.getpid())[victim], signal.SIGKILL)

    when_training(new_run, threading.Thread(target=kill))
    with pytest.raises(LaunchError, match=f"rank {victim} of .* failed with signal SIGKILL"):
        launcher.run(new_run, num_workers=2)
    assert killed_at
    assert time.monotonic() - killed_at[0] < 15
    assert not ranks_below(os.getpid())
    assert read_verdict(new_run) is None


@pytest.mark.slow
def test_a_stop_request_leaves_a_checkpoint_and_the_run_goes_on(
    launcher: LocalLauncher, tiny_run: Path, cli
) -> None:
    overrides = ["name=stopped", "train.total_tokens=12800"]
    run_dir = init_run(load_run(tiny_run, overrides), prepare)
    when_training(run_dir, threading.Thread(target=(run_dir / STOP_FILE).touch))
    assert launcher.run(run_dir, num_workers=2) == "stopped"
    assert read_verdict(run_dir) == "stopped"
    assert not (run_dir / STOP_FILE).exists()
    assert launcher.run(run_dir, num_workers=2) == "complete"
    result = read_result(run_dir)
    assert (result.steps, result.attempts) == (100, 2)
    resumed = [event for event in read_events(run_dir / "events.jsonl") if event.kind == "resume"]
    assert [event.step > 0 for event in resumed] == [True]

    shown = cli("train", tiny_run, *overrides)
    assert shown.code == 0
    assert "is finished already" in shown.out
    assert cli("sync", run_dir, "--json").tree["num_points"] > 0
    assert cli("sync", run_dir, "--json").tree["num_points"] == 0
    assert len(cli("verify", run_dir, "--json").tree["verified"]) >= 2
    damaged = next((run_dir / "checkpoints").rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shown = cli("verify", run_dir)
    assert shown.code == 1
    assert damaged.name in shown.err


@pytest.mark.slow
def test_a_terminated_command_ends_with_75_and_a_checkpoint(tiny_run: Path) -> None:
    with interruptible_train(tiny_run, "terminated") as (process, run_dir):
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped with a checkpoint" in shown
    assert read_verdict(run_dir) == "stopped"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_ranks_that_do_not_stop(tiny_run: Path) -> None:
    with interruptible_train(tiny_run, "interrupted-twice") as (process, run_dir):
        ranks = ranks_below(process.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        wait_until((run_dir / STOP_FILE).exists)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(ranks) == 2
    wait_until(lambda: not any(map(is_alive, ranks)), timeout_seconds=5)
    assert read_verdict(run_dir) is None
    assert not (run_dir / STOP_FILE).exists()


def test_the_end_of_a_log_is_quoted_and_an_absent_one_is_empty(tmp_path: Path) -> None:
    assert last_lines(log_path(tmp_path, 0)) == ""
    log_path(tmp_path, 0).write_text("\n".join(f"line {number}" for number in range(100)))
    assert last_lines(log_path(tmp_path, 0), 2) == "  line 98\n  line 99"
