import os
import signal
import threading
from pathlib import Path

from pipeline.training.stopping import StopWatch, first_reason


def test_signal_is_noted_once_and_the_second_one_gets_through(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopWatch(tmp_path, 1, None) as stop:
        assert first_reason(stop.votes(1)) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert first_reason(stop.votes(1)) == "signal"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_thread_that_cannot_take_signals_still_watches(tmp_path: Path) -> None:
    reasons = []

    def watch() -> None:
        with StopWatch(tmp_path, 0, 5) as stop:
            reasons.extend(first_reason(stop.votes(step)) for step in (4, 5))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert reasons == [None, "steps"]


def test_only_rank_0_looks_for_the_stop_file(tmp_path: Path) -> None:
    (tmp_path / "stop.request").touch()
    assert first_reason(StopWatch(tmp_path, 0, None).votes(1)) == "request"
    assert first_reason(StopWatch(tmp_path, 1, None).votes(1)) is None


def test_vote_of_any_rank_is_a_reason() -> None:
    assert first_reason([0.0, 0.0, 3.0]) == "steps"
    assert first_reason([0.0, 1.0, 3.0]) == "request"
    assert first_reason([0.0, 0.0, 0.0]) is None
