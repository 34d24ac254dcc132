"""A fault plan strikes where it says, once, and only where it is allowed."""

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.training.faults import ALLOW_VARIABLE, PLAN_VARIABLE, load_plan
from pipeline.training.heartbeat import Heartbeat, read_heartbeats, started_ticks
from pipeline.training.phases import altered, enter, following

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def set_plan(patch: pytest.MonkeyPatch, path: Path, *faults: dict[str, Any]) -> Path:
    path.write_text(json.dumps(faults))
    patch.setenv(PLAN_VARIABLE, str(path))
    patch.setenv(ALLOW_VARIABLE, "1")
    return path.with_suffix(".fired.jsonl")


@contextmanager
def followed(run_dir: Path, attempt: int = 1) -> Iterator[Path]:
    heartbeat = Heartbeat(run_dir / "heartbeats", 0, attempt)
    with following(run_dir, heartbeat, attempt):
        yield run_dir / "heartbeats"
    heartbeat.close()


def fired(log: Path) -> list[tuple[str, str, int]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(line["id"], line["phase"], line["step"]) for line in lines]


def test_a_fault_strikes_once_at_its_step_and_phase(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    fault = {"id": "f", "rank": 0, "attempt": 1, "step": 2, "phase": "backward", "action": "raise"}
    log = set_plan(monkeypatch, run_dir.parent / "plan.json", fault)
    with followed(run_dir):
        enter("data.next", 1)
        enter("backward")
        enter("data.next", 2)
        enter("forward")
        assert fired(log) == []
        with pytest.raises(RuntimeError, match="injected fault f"):
            enter("backward")
        enter("backward")
    assert fired(log) == [("f", "backward", 2)]
    with followed(run_dir, attempt=2):
        enter("backward", 2)
    assert len(fired(log)) == 1


def test_faults_of_other_ranks_and_hosts_do_not_strike(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    log = set_plan(
        monkeypatch, run_dir.parent / "plan.json",
        {"id": "rank", "rank": 1, "phase": "exit", "action": "raise"},
        {"id": "host", "host": "elsewhere", "phase": "exit", "action": "raise"},
    )  # fmt: skip
    with followed(run_dir):
        enter("exit")
    assert fired(log) == []


def test_the_nth_passage_is_counted_and_a_full_disk_is_an_os_error(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    fault = {"id": "full", "phase": "checkpoint.write", "action": "enospc", "nth": 3}
    log = set_plan(monkeypatch, run_dir.parent / "plan.json", fault)
    with followed(run_dir):
        enter("checkpoint.write", 5)
        enter("checkpoint.write", 5)
        with pytest.raises(OSError, match="No space left") as caught:
            enter("checkpoint.write", 6)
    assert caught.value.errno == errno.ENOSPC
    assert fired(log) == [("full", "checkpoint.write", 6)]


def test_a_value_is_multiplied_in_one_step_only(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    fault = {"phase": "loss", "action": "multiply"}
    log = set_plan(
        monkeypatch, run_dir.parent / "plan.json",
        {"id": "nan", "step": 1, "args": {"factor": "nan"}, **fault},
        {"id": "spike", "step": 2, "args": {"factor": 1e4}, **fault},
    )  # fmt: skip
    assert altered("loss", 3.0) == 3.0
    with followed(run_dir):
        enter("data.next", 1)
        assert math.isnan(altered("loss", 3.0))
        enter("data.next", 2)
        assert altered("loss", 3.0) == 3e4
        assert altered("loss", 3.0) == 3.0
    assert fired(log) == [("nan", "loss", 1), ("spike", "loss", 2)]


def test_a_killed_process_has_proven_its_fault(tmp_path: Path, run_dir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        log = set_plan(
            patch, tmp_path / "plan.json", {"id": "k", "phase": "exit", "action": "kill"}
        )
        script = (
            "import sys; from pathlib import Path\n"
            "from tests.training.test_faults import enter, followed\n"
            "with followed(Path(sys.argv[1])): enter('exit')\n"
        )
        command = [sys.executable, "-c", script, str(run_dir)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    assert ended.returncode == -9
    assert fired(log) == [("k", "exit", 0)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"phase": "forwards", "action": "kill"}, "Input should be 'data.next'"),
        ({"phase": "forward", "action": "sleep"}, r"sleep are \[\], it takes \['seconds'\]"),
        ({"phase": "forward", "action": "kill", "args": {"seconds": 1}}, "kill are"),
        ({"phase": "forward", "action": "multiply", "args": {"factor": 2}}, "goes with loss"),
        ({"phase": "forward", "action": "kill", "when": 3}, "Extra inputs"),
    ],
)
def test_a_plan_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, fault: dict[str, Any], message: str
) -> None:
    set_plan(monkeypatch, run_dir.parent / "plan.json", {"id": "f", **fault})
    with pytest.raises(ConfigError, match=message):
        load_plan(run_dir, 0, 1)


def test_a_plan_needs_an_allowance_and_a_place_outside_the_run(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    set_plan(monkeypatch, run_dir / "plan.json")
    with pytest.raises(ConfigError, match="lies in the run directory"):
        load_plan(run_dir, 0, 1)
    monkeypatch.delenv(ALLOW_VARIABLE)
    with pytest.raises(ConfigError, match=f"{ALLOW_VARIABLE} is not 1"):
        load_plan(run_dir, 0, 1)
    monkeypatch.delenv(PLAN_VARIABLE)
    assert load_plan(run_dir, 0, 1) is None


def test_a_heartbeat_counts_phases_and_tells_who_is_behind(run_dir: Path) -> None:
    with followed(run_dir) as directory:
        enter("data.next", 4)
        enter("track.log")
        enter("forward")
        member, beat = read_heartbeats(directory)[0]
        assert (member.rank, member.pid, member.attempt) == (0, os.getpid(), 1)
        assert member.started_ticks == started_ticks(os.getpid())
        # The log is written by rank 0 alone, so it does not put rank 0 ahead.
        assert (beat.step, beat.position, beat.count, beat.phase) == (4, 2, 3, "forward")
        enter("data.next", 5)
        _, beat = read_heartbeats(directory)[0]
        assert (beat.step, beat.position, beat.count) == (5, 1, 4)
    assert read_heartbeats(directory) == {}


def test_files_of_an_earlier_attempt_tell_nothing(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 1, 1)
    Heartbeat(tmp_path, 0, 2)
    assert list(read_heartbeats(tmp_path)) == [0]


def test_a_rank_that_was_replaced_leaves_the_file_of_its_successor(tmp_path: Path) -> None:
    replaced = Heartbeat(tmp_path, 0, 1)
    successor = Heartbeat(tmp_path, 0, 2)
    replaced.close()
    assert read_heartbeats(tmp_path)[0][0].attempt == 2
    successor.close()
    assert read_heartbeats(tmp_path) == {}
