"""Of all ranks that fail, the one that the others followed is named."""

import json
import os
import socket
from pathlib import Path

import pytest

from launch.rank_record import (
    clear_records,
    count_oom_kills,
    first_failure,
    newest_checkpoint_step,
    read_records,
    recorded,
)
from pipeline.errors import ConfigError, LaunchError, TrainingDiverged
from pipeline.tracking.events import EventWriter

HOST = socket.gethostname()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    (path / "run.yaml").touch()
    return path


def fail(run_dir: Path, rank: int, error: Exception) -> None:
    with pytest.raises(type(error)), recorded(run_dir, rank):
        raise error


def begin(run_dir: Path, rank: int) -> None:
    with recorded(run_dir, rank):
        pass


def test_a_host_without_the_run_directory_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(LaunchError, match=f"host {HOST} does not see the run directory"),
        recorded(tmp_path / "elsewhere", 0),
    ):
        raise AssertionError("the rank ran")


def test_a_rank_says_where_it_runs_and_what_ended_it(run_dir: Path) -> None:
    begin(run_dir, 0)
    fail(run_dir, 1, ConfigError("no such thing"))
    records = read_records(run_dir)
    assert (records[0].host, records[0].process_id) == (HOST, os.getpid())
    assert records[0].kind is None
    assert (records[1].kind, records[1].cause) == ("ConfigError", "no such thing")
    # As a rank leaves it that is killed while it writes.
    (run_dir / ".rank-1.json.123.tmp").touch()
    clear_records(run_dir)
    assert [path.name for path in run_dir.iterdir()] == ["run.yaml"]


def test_a_killed_rank_comes_before_those_that_lost_it(run_dir: Path) -> None:
    fail(run_dir, 0, RuntimeError("Connection closed by peer"))
    begin(run_dir, 1)
    failure = first_failure(run_dir, {0: "exit code 1", 1: "signal SIGKILL"})
    assert str(failure).startswith(
        f"rank 1 of run on {HOST} before its first step failed with signal SIGKILL"
    )
    assert not failure.is_final
    # Where the launcher cannot tell, or was told of the other only, the rank's silence does.
    for endings in (None, {0: "exit code 1"}):
        failure = first_failure(run_dir, endings)
        assert f"rank 1 of run on {HOST} before its first step failed with no word" in str(failure)


def test_a_kill_for_lack_of_memory_is_told_by_the_kernels_count(run_dir: Path) -> None:
    begin(run_dir, 1)
    before = count_oom_kills()
    assert before == read_records(run_dir)[1].oom_kills
    assert before is not None
    assert "out of memory" not in str(first_failure(run_dir, {1: "signal SIGKILL"}))
    # As a rank has noted that began before the last of them.
    path = run_dir / "rank-1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"oom_kills": before - 1}))
    assert "out of memory" not in str(first_failure(run_dir, {1: "signal SIGSEGV"}))
    told = str(first_failure(run_dir, {1: "signal SIGKILL"}))
    assert "failed with signal SIGKILL, out of memory (OOM): the kernel of this host" in told
    assert "killed 1 process(es)" in told


def test_an_error_that_tells_of_no_peer_is_the_ranks_own(run_dir: Path) -> None:
    begin(run_dir, 0)
    fail(run_dir, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert "rank 1 of run" in str(first_failure(run_dir, {1: "exit code 1"}))


def test_an_error_of_its_own_comes_before_a_silent_rank(run_dir: Path) -> None:
    begin(run_dir, 0)
    fail(run_dir, 1, TrainingDiverged("loss is nan"))
    failure = first_failure(run_dir, {0: "signal SIGTERM", 1: "exit code 1"})
    assert "rank 1 of run" in str(failure)
    assert "TrainingDiverged: loss is nan" in str(failure)
    assert failure.is_final


def test_of_several_errors_the_first_counts_and_gives_its_exit_code(run_dir: Path) -> None:
    fail(run_dir, 1, ConfigError("first"))
    os.utime(run_dir / "rank-1.json", (1, 1))
    fail(run_dir, 0, ConfigError("second"))
    failure = first_failure(run_dir, {0: "exit code 2", 1: "exit code 2"})
    assert "ConfigError: first" in str(failure)
    assert failure.exit_code == 2


def test_the_step_and_the_newest_checkpoint_come_from_the_event_log(run_dir: Path) -> None:
    assert newest_checkpoint_step(run_dir) is None
    with EventWriter(run_dir / "events.jsonl", attempt=1) as events:
        events.write("start", 0)
        events.write("checkpoint", 20)
        events.write("train", 25, {"train/loss": 1.0})
    begin(run_dir, 0)
    failure = first_failure(run_dir)
    assert "on " + HOST + " after step 25 failed with no word" in str(failure)
    assert failure.step == 20
