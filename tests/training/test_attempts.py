"""What earlier attempts leave to the next: the account of their time, and reason to give up."""

from typing import Any

import pytest

from pipeline.errors import LaunchError
from pipeline.tracking.events import Event, EventKind, read_events
from pipeline.training.attempts import ACCOUNT, check_progress, spent_before, train_seconds_until
from tests.training.rank_pool import RankPool
from tests.training.runs import Runs, every_step, train_rank


class Log:
    """Builds events by hand; the account of each is (wall, train)."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(
        self,
        attempt: int,
        kind: EventKind,
        step: int,
        at: float,
        spent: tuple[float, float] | None = None,
        **values: Any,
    ) -> None:
        if spent is not None:
            wall, train = spent
            values[ACCOUNT] = {"wall": wall, "train": train, "init": wall - train}
        self.events.append(
            Event(
                seq=len(self.events), attempt=attempt, kind=kind, step=step,
                time_unix_seconds=at, values=values,
            )
        )  # fmt: skip


def killed() -> Log:
    """Starts at 1000 s after 5 s, trains 1 s a step, is killed some time after an event at 1021."""
    log = Log()
    log.add(1, "start", 0, 1005.0, (5.0, 0.0))
    log.add(1, "train", 10, 1015.0, (15.0, 10.0))
    # Written 1 s after the account was taken, as a checkpoint beside training is.
    log.add(1, "checkpoint", 10, 1016.0, (15.0, 10.0))
    log.add(1, "train", 13, 1018.0, (18.0, 13.0))
    log.add(1, "skip", 16, 1021.0)
    return log


def test_killed_attempt_leaves_no_second_without_a_name() -> None:
    spent = spent_before(killed().events, 10, 1030.0)
    assert spent == {
        "wall": 30.0, "init": 5.0, "train": 10.0, "lost": 3.0, "detect": 3.0, "restart": 9.0,
    }  # fmt: skip
    assert sum(v for k, v in spent.items() if k != "wall") == spent["wall"]


def test_time_after_an_agreed_stop_is_idle() -> None:
    log = killed()
    log.add(1, "checkpoint", 16, 1022.0, (22.0, 16.0))
    log.add(1, "stop", 16, 1022.0, (22.0, 16.0))
    spent = spent_before(log.events, 16, 9000.0)
    assert (spent["idle"], spent["detect"], spent["lost"]) == (9000.0 - 1022.0, 0.0, 0.0)
    assert "restart" not in spent
    assert spent["wall"] == 8000.0


def test_attempt_that_wrote_its_error_was_noticed_then() -> None:
    log = killed()
    log.add(1, "abort", 16, 1028.0, error="RuntimeError: Connection closed by peer")
    spent = spent_before(log.events, 10, 1030.0)
    assert (spent["detect"], spent["restart"]) == (10.0, 2.0)


def test_clock_that_was_set_back_gives_no_time_back() -> None:
    spent = spent_before(killed().events, 10, 900.0)
    assert spent["restart"] == 0.0
    assert spent["wall"] == 21.0


def test_kept_time_is_that_of_the_checkpoint_though_its_event_came_late() -> None:
    log = killed()
    log.add(1, "checkpoint", 13, 1024.0, (18.0, 13.0))
    assert train_seconds_until(log.events, 13) == 13.0
    assert train_seconds_until(log.events, 12) == 10.0
    assert train_seconds_until(log.events, 9) == 0.0


def starts(*ends: EventKind) -> Log:
    log = Log()
    for attempt, end in enumerate(ends, 1):
        log.add(attempt, "resume", 20, 100.0 * attempt)
        log.add(attempt, end, 25, 100.0 * attempt + 9.0, error="RuntimeError: boom")
    return log


def test_attempts_without_progress_are_counted_and_shown() -> None:
    check_progress(starts("abort", "train").events, 20, 3)
    with pytest.raises(LaunchError) as refused:
        check_progress(starts("abort", "train", "abort").events, 20, 3)
    told = str(refused.value)
    assert "3 attempts in a row began at step 20" in told
    assert "attempt 3: reached step 25, last event abort 1970-01-01 00:05:09 UTC" in told
    assert "RuntimeError: boom" in told
    assert "guard.max_attempts_without_progress=4" in told


@pytest.mark.parametrize("end", ["checkpoint", "stop", "finish"])
def test_progress_or_an_agreed_stop_starts_the_count_anew(end: EventKind) -> None:
    check_progress(starts("abort", "abort", end).events, 20, 3)
    check_progress(starts("abort", "abort", end, "abort", "abort").events, 20, 3)
    with pytest.raises(LaunchError):
        check_progress(starts(end, "abort", "abort", "abort").events, 20, 3)


def test_only_starts_from_the_same_step_count() -> None:
    check_progress(starts("abort", "abort", "abort").events, 19, 3)


def test_rewind_is_no_start() -> None:
    log = starts("train")
    for attempt in (2, 3):
        log.add(attempt, "resume", 20, 200.0, rewind={"reason": "step 30 is a spike"})
    check_progress(log.events, 20, 2)
    assert log.events[-1].attempt == 3


@pytest.mark.slow
def test_run_that_fails_at_the_same_place_is_refused_after_three_attempts(
    two_ranks: RankPool, runs: Runs
) -> None:
    run = every_step("gpt", 1, guard={"max_nonfinite_steps": 1}, eval={"every_steps": None})
    wild = run.train.optimizer.model_copy(update={"learning_rate": 1e30})
    train_config = run.train.model_copy(update={"optimizer": wild})
    run_dir = runs.make("run", run.model_copy(update={"train": train_config}))
    for _ in range(3):
        assert "steps in a row" in str(two_ranks.run(train_rank, run_dir)[0])
    log = (run_dir / "events.jsonl").read_bytes()
    errors = two_ranks.run(train_rank, run_dir)
    assert all(isinstance(error, LaunchError) for error in errors)
    assert str(errors[0]) == str(errors[1])
    assert "3 attempts in a row began at step 0" in str(errors[0])
    assert "TrainingDiverged: 1 steps in a row up to step 2" in str(errors[0])
    # A refusal is no attempt, and another number lets the run go on.
    assert (run_dir / "events.jsonl").read_bytes() == log
    text = (run_dir / "run.yaml").read_text()
    allowed = text.replace("without_progress: 3", "without_progress: 4")
    assert allowed != text
    (run_dir / "run.yaml").write_text(allowed)
    assert "steps in a row" in str(two_ranks.run(train_rank, run_dir)[0])
    assert read_events(run_dir / "events.jsonl")[-1].attempt == 4
