"""What preparing reports stands in the log of its directory, each count once over all attempts."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from launch.prepare_record import PrepareRecorder, event_values
from pipeline.config.data import DataConfig
from pipeline.data.progress import PrepareEvent, PrepareTotals
from pipeline.tracking.events import Event, EventWriter, read_events

NOTHING = PrepareTotals(num_splits=4, num_files=2)
TOTALS = PrepareTotals(
    num_splits=4,
    num_files=2,
    num_splits_done=1,
    documents=10,
    text_bytes=4000,
    tokens=1010,
    dropped_documents=Counter(empty=2, short=5),
    quarantined=Counter(invalid_json=1),
    seconds=2.0,
)


def recorder() -> PrepareRecorder:
    return PrepareRecorder(DataConfig(), uri=None, on_event=print, event_seconds=0.0)


def at(totals: PrepareTotals, directory: Path, *, is_finished: bool = False) -> PrepareEvent:
    return PrepareEvent(message="", totals=totals, directory=directory, is_finished=is_finished)


def steps_done(number: int) -> PrepareTotals:
    return replace(TOTALS, num_splits_done=number, documents=10 * number, tokens=1010 * number)


def read(directory: Path) -> list[Event]:
    return read_events(directory / "events.jsonl")


def test_counts_rates_and_reasons_are_those_of_the_totals(tmp_path: Path) -> None:
    with recorder() as record:
        record.take(at(NOTHING, tmp_path))
        record.take(at(TOTALS, tmp_path))
    start, done, finish = read(tmp_path)
    assert [event.kind for event in (start, done, finish)] == ["start", "prepare", "finish"]
    assert done.metrics == {
        "data/documents": 10,
        "data/text_bytes": 4000,
        "data/tokens": 1010,
        "data/text_bytes_per_second": 2000.0,
        "data/tokens_per_second": 505.0,
        "data/bytes_per_token": 4.0,
        "data/dropped_documents": 7,
        "data/quarantined": 1,
    }
    assert list(done.values["dropped"].items()) == [("short", 5), ("empty", 2)]
    assert done.values["quarantined"] == {"invalid_json": 1}


def test_many_small_splits_make_few_events_and_the_last_counts_stand(tmp_path: Path) -> None:
    with PrepareRecorder(DataConfig(), uri=None, on_event=print, event_seconds=3600) as record:
        record.take(at(NOTHING, tmp_path))
        for number in (1, 2, 3, 4):
            record.take(at(steps_done(number), tmp_path))
        record.take(at(replace(steps_done(4), seconds=9.0), tmp_path, is_finished=True))
    written = [(e.step, e.metrics["data/documents"]) for e in read(tmp_path) if e.metrics]
    assert written == [(1, 10.0), (4, 40.0)]


def test_a_rerun_after_a_kill_is_the_next_attempt_and_repeats_no_count(tmp_path: Path) -> None:
    with EventWriter(tmp_path / "events.jsonl", attempt=1) as killed:
        killed.write("start", 0)
        for number in (1, 2):
            killed.write("prepare", number, event_values(steps_done(number)))
    with recorder() as record:
        record.take(at(steps_done(2), tmp_path))
        record.take(at(steps_done(3), tmp_path))
    lines = [(event.attempt, event.kind, event.step) for event in read(tmp_path)]
    assert lines == [
        (1, "start", 0), (1, "prepare", 1), (1, "prepare", 2),
        (2, "resume", 2), (2, "prepare", 3), (2, "finish", 3),
    ]  # fmt: skip


def test_counts_that_change_without_a_further_split_are_written(tmp_path: Path) -> None:
    with recorder() as record:
        record.take(at(NOTHING, tmp_path))
        record.take(at(steps_done(2), tmp_path))
        record.take(at(replace(steps_done(2), documents=19), tmp_path))
    written = [(e.step, e.metrics["data/documents"]) for e in read(tmp_path) if e.metrics]
    assert written == [(2, 20.0), (2, 19.0)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("s3://me:canary@host/x is gone"), "ValueError: s3://***@host/x is gone"),
    ],
)
def test_the_log_tells_how_a_failed_preparation_ended(
    tmp_path: Path, error: BaseException, reason: str
) -> None:
    def fail() -> None:
        with recorder() as record:
            record.take(at(NOTHING, tmp_path))
            record.take(at(TOTALS, tmp_path))
            raise error

    with pytest.raises(type(error)):
        fail()
    last = read(tmp_path)[-1]
    assert (last.kind, last.step, last.values) == ("stop", 1, {"reason": reason})


def test_shards_that_are_there_leave_no_log(tmp_path: Path) -> None:
    with recorder() as record:
        record.take(PrepareEvent(message="reusing"))
        record.take(at(TOTALS, tmp_path, is_finished=True))
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_down_fails_nothing_and_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database" * 100)
    said: list[str] = []
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with PrepareRecorder(DataConfig(), uri=uri, on_event=said.append) as record:
        record.take(at(NOTHING, tmp_path))
        record.take(at(TOTALS, tmp_path))
    assert f"send it with: python -m launch sync {tmp_path}" in said[0]
    assert "cannot open the tracking store" in said[1]
    assert [event.kind for event in read(tmp_path)] == ["start", "prepare", "finish"]
