import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import TrackingError
from pipeline.tracking.events import EventWriter, next_attempt, read_events, surviving_events


def write_attempt(path: Path, attempt: int, first: int, last: int) -> None:
    """Write an attempt that begins after step `first` and trains up to `last`."""
    with EventWriter(path, attempt) as events:
        events.write("resume" if first else "start", first)
        for step in range(first + 1, last + 1):
            events.write("train", step, {"train/loss": 10.0 * attempt + step})


def test_events_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path, attempt=1) as events:
        written = events.write("train", 7, {"train/loss": 2.5, "reason": "none", "ranks": [0, 1]})
    assert read_events(path) == [written]
    assert written.metrics == {"train/loss": 2.5}
    line = json.loads(path.read_text())
    assert list(line) == ["seq", "attempt", "kind", "step", "time_unix_seconds", "values"]


def test_each_event_is_readable_before_the_log_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path, attempt=1) as events:
        events.write("start", 0)
        assert [event.kind for event in read_events(path)] == ["start"]


def test_numbers_that_are_not_finite_stay_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path, attempt=1) as events:
        events.write("skip", 1, {"train/loss": math.nan, "train/grad_norm": math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    (event,) = read_events(path)
    assert math.isnan(event.metrics["train/loss"])
    assert event.metrics["train/grad_norm"] == math.inf


@pytest.mark.parametrize("torn", [b'{"seq": 3, "att', b"\0\0\0\0", b'{"seq":3}'])
def test_a_torn_last_line_is_ignored_and_then_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "events.jsonl"
    write_attempt(path, 1, 0, 2)
    with path.open("ab") as file:
        file.write(torn)
    assert [event.step for event in read_events(path)] == [0, 1, 2]
    write_attempt(path, 2, 2, 3)
    assert [event.seq for event in read_events(path)] == [0, 1, 2, 3, 4]


def test_a_log_of_only_a_torn_line_starts_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"seq": 0, "at')
    write_attempt(path, 1, 0, 1)
    assert [event.seq for event in read_events(path)] == [0, 1]


def test_a_damaged_line_inside_the_log_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write_attempt(path, 1, 0, 2)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "garbage", lines[2], ""]))
    with pytest.raises(TrackingError, match=r"events\.jsonl:2 is not an event"):
        read_events(path)


def test_a_missing_log_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl") == []
    assert next_attempt(tmp_path / "events.jsonl") == 1


def test_seq_and_attempt_continue_over_attempts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write_attempt(path, next_attempt(path), 0, 3)
    write_attempt(path, next_attempt(path), 2, 4)
    events = read_events(path)
    assert [event.seq for event in events] == list(range(7))
    assert [event.attempt for event in events] == [1, 1, 1, 1, 2, 2, 2]


def test_an_earlier_attempt_cannot_append_after_a_later_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write_attempt(path, 2, 0, 1)
    with pytest.raises(TrackingError, match="already holds attempt 2"):
        EventWriter(path, attempt=1)


def test_a_process_that_was_taken_over_writes_nothing_behind_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path, attempt=1) as stalled:
        stalled.write("train", 1)
        write_attempt(path, 2, 1, 3)
        with pytest.raises(TrackingError, match="another process took the run over"):
            stalled.write("train", 2)
    assert [(e.attempt, e.step) for e in read_events(path)] == [(1, 1), (2, 1), (2, 2), (2, 3)]


def test_a_line_that_finds_no_room_is_taken_back_and_the_next_one_follows(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write_attempt(path, 1, 0, 2)
    before = path.read_bytes()
    with EventWriter(path, attempt=2) as events:
        with at_most_bytes_in_a_file(len(before) + 40), pytest.raises(OSError, match="too large"):
            events.write("train", 3)
        assert path.read_bytes() == before
        events.write("train", 3)
    assert [(e.seq, e.step) for e in read_events(path)] == [(0, 0), (1, 1), (2, 2), (3, 3)]


@contextmanager
def at_most_bytes_in_a_file(num_bytes: int) -> Iterator[None]:
    """Let writes of this process end at a size: short first, then with an error, as a disk does."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_a_rewind_replaces_what_came_after_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write_attempt(path, 1, 0, 5)
    write_attempt(path, 2, 2, 4)
    losses = {
        e.step: e.metrics["train/loss"] for e in surviving_events(read_events(path)) if e.metrics
    }
    assert losses == {1: 11.0, 2: 12.0, 3: 23.0, 4: 24.0}


def test_a_later_rewind_reaches_through_several_attempts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write_attempt(path, 1, 0, 5)
    write_attempt(path, 2, 4, 6)
    write_attempt(path, 3, 1, 2)
    losses = {
        e.step: e.metrics["train/loss"] for e in surviving_events(read_events(path)) if e.metrics
    }
    assert losses == {1: 11.0, 2: 32.0}


def test_of_two_evaluations_at_one_step_the_later_survives(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for attempt in (1, 2):
        with EventWriter(path, attempt) as events:
            events.write("resume", 4)
            events.write("eval", 4, {"eval/loss": float(attempt)})
    kept = [e.metrics["eval/loss"] for e in surviving_events(read_events(path)) if e.metrics]
    assert kept == [2.0]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("train", {"train/lossy": 1.0}, "unknown metric 'train/lossy'"),
        ("train", {"train/loss": None}, "is None, not a number"),
        ("train", {"train/loss": True}, "is True, not a number"),
        ("pause", {}, "unknown event kind 'pause'"),
    ],
)
def test_an_event_that_says_nothing_known_is_refused(
    tmp_path: Path, kind: str, values: dict[str, object], message: str
) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path, attempt=1) as events:
        with pytest.raises(TrackingError, match=message):
            events.write(kind, 1, values)
        events.write("start", 0)
    assert [event.seq for event in read_events(path)] == [0]
