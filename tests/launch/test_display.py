"""Progress is read from an event log that other processes write, and that a kill may tear."""

from pathlib import Path

from launch.display import EventTail
from pipeline.tracking.events import EventWriter


def test_progress_begins_behind_the_last_whole_line_of_a_torn_log(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path, attempt=1) as events:
        events.write("train", 1, {"train/loss": 5.0})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    tail = EventTail(path=path)
    with EventWriter(path, attempt=2) as events:
        tail.read()
        events.write("resume", 1)
        events.write("train", 2, {"train/loss": 4.0})
        tail.read()
    assert (tail.step, tail.loss) == (2, 4.0)


def test_progress_begins_at_the_top_of_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    tail = EventTail(path=tmp_path / "events.jsonl")
    tail.read()
    assert tail.step == 0
    with EventWriter(tail.path, attempt=1) as events:
        events.write("start", 0)
        events.write("train", 3, {"train/loss": 2.5})
    tail.read()
    assert tail.describe(10).startswith("step 3/10, loss 2.500")
