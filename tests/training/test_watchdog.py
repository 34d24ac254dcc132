"""The watchdog ends ranks that stand still, names the late one, and leaves slow ones alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.training.heartbeat import Heartbeat
from pipeline.training.watchdog import FIRST_STEP_FACTOR, RankState, Settings, describe, find_late

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import ctypes, faulthandler, os, signal, sys, time
from pathlib import Path
from pipeline.training.heartbeat import Heartbeat

rank, directory, script = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
heartbeat = Heartbeat(directory, rank, 1)
heartbeat.beat(2, "data.next")
print("beats", flush=True)
exec(script)
"""
HANGS = "def hangs_here():\n  while True: time.sleep(60)\nhangs_here()"
LATE = f"heartbeat.beat(2, 'forward')\n{HANGS}"
WAITS = f"heartbeat.beat(2, 'forward'); heartbeat.beat(2, 'allreduce')\n{HANGS}"
HOLDS_GIL = "heartbeat.beat(2, 'forward')\nwhile True: ctypes.PyDLL(None).sleep(600)"
STOPS = "heartbeat.beat(2, 'forward'); os.kill(os.getpid(), signal.SIGSTOP)"
"""Further than the others and stopped: what the process's state says comes first."""
SLOW = "for _ in range(8): heartbeat.beat(2, 'forward'); time.sleep(0.6)"


class Host:
    """Ranks as bare processes, and their watchdog."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.settings = Settings(
            directory=str(place / "beats"), limit_seconds=0.4, report=str(place / "hangs.jsonl"),
            logs=str(place / "rank-{rank}.log"), recorder=str(place / "nccl-"),
        )  # fmt: skip
        self.processes: list[subprocess.Popen[Any]] = []

    def start(self, *scripts: str) -> None:
        (self.place / "beats").mkdir()
        for rank, script in enumerate(scripts):
            arguments = [str(rank), self.settings.directory, script]
            with (self.place / f"rank-{rank}.log").open("wb") as log:
                command = [sys.executable, "-S", "-c", RANK, *arguments]
                self.processes.append(self._popen(command, stdout=subprocess.PIPE, stderr=log))
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"beats\n"

    def watch(self, **changes: Any) -> subprocess.Popen[Any]:
        settings = json.dumps(asdict(replace(self.settings, **changes)))
        command = [sys.executable, "-S", "-m", "pipeline.training.watchdog", settings]
        watchdog = self._popen(command, stderr=subprocess.DEVNULL)
        self.processes.append(watchdog)
        return watchdog

    def _popen(self, command: list[str], **places: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **places)

    def report(self) -> list[dict[str, Any]]:
        path = Path(self.settings.report)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, rank: int) -> str:
        return (self.place / f"rank-{rank}.log").read_text()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    built = Host(tmp_path)
    yield built
    for process in built.processes:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.mark.parametrize(
    ("late", "state"), [(LATE, "waiting"), (HOLDS_GIL, "waiting"), (STOPS, "stopped by a signal")]
)
def test_the_late_rank_is_named_and_all_are_ended(host: Host, late: str, state: str) -> None:
    host.start(WAITS, late)
    assert host.watch().wait(60) == 0
    assert [process.wait(10) for process in host.processes[:2]] == [-signal.SIGKILL] * 2
    (report,) = host.report()
    assert report["late_ranks"] == [1]
    assert report["silent_seconds"] > report["limit_seconds"] == FIRST_STEP_FACTOR * 0.4
    assert [(r["rank"], r["phase"]) for r in report["ranks"]] == [(0, "allreduce"), (1, "forward")]
    assert "rank 1 is late" in host.log(1)
    assert f"step 2, forward, {state}" in host.log(1)
    # The rank that waits has written where it does.
    assert "in hangs_here" in host.log(0)
    assert "rank 1 is late" not in host.log(0)


def test_ranks_that_are_equally_far_are_ended_and_none_is_blamed(host: Host) -> None:
    host.start(LATE, LATE)
    assert host.watch().wait(60) == 0
    assert [process.wait(10) for process in host.processes[:2]] == [-signal.SIGKILL] * 2
    (report,) = host.report()
    assert report["late_ranks"] == []
    assert "in hangs_here" in host.log(0)
    assert "in hangs_here" in host.log(1)


def test_slow_ranks_are_left_alone_and_the_watchdog_ends_with_them(host: Host) -> None:
    host.start(SLOW, SLOW)
    assert host.watch().wait(60) == 0
    assert [process.wait(10) for process in host.processes[:2]] == [0, 0]
    assert host.report() == []


def test_a_suspended_watchdog_does_not_take_its_own_sleep_for_a_hang(host: Host) -> None:
    host.start(SLOW)
    watchdog = host.watch()
    os.kill(watchdog.pid, signal.SIGSTOP)
    os.kill(host.processes[0].pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(watchdog.pid, signal.SIGCONT)
    os.kill(host.processes[0].pid, signal.SIGCONT)
    assert watchdog.wait(60) == 0
    assert host.processes[0].wait(10) == 0
    assert host.report() == []


def test_the_first_step_has_four_times_as_long(host: Host) -> None:
    host.start("time.sleep(2.5); heartbeat.beat(2, 'forward')")
    assert host.watch(limit_seconds=1.0).wait(60) == 0
    assert host.processes[0].wait(10) == 0
    assert host.report() == []


def rank_state(rank: int, **fields: Any) -> RankState:
    known = {"host": "a", "pid": 7, "step": 3, "phase": "backward", "position": 4, "state": "S"}
    return RankState(rank=rank, waits_in=None, **{**known, **fields})


def test_a_rank_of_another_host_can_be_the_late_one() -> None:
    seen = [rank_state(0), rank_state(1, host="b", step=2, position=9, state=None)]
    assert find_late(seen) == [1]
    text = describe("a", 31.0, seen, [1])
    assert "no rank here has moved for 31 s; rank 1 is late" in text
    assert text.splitlines()[1] == (
        "  rank 1 on b (pid 7): late, step 2, backward, on another host"
    )


def test_a_dead_rank_that_left_its_file_is_not_waited_for(host: Host) -> None:
    (host.place / "beats").mkdir()
    Heartbeat(host.place / "beats", 0, 1)
    path = next((host.place / "beats").iterdir())
    # The pid lives, as that of a process started at another time.
    path.write_bytes(path.read_bytes().replace(b'"started_ticks": ', b'"started_ticks":1'))
    assert host.watch().wait(30) == 0
    assert host.report() == []
