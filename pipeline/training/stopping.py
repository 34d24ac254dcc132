"""Why a run should stop before its end: a signal, a file, or a number of steps."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

STOP_FILE = "stop.request"
"""A file in the run directory that asks for a stop; the launcher makes and removes it."""
REASONS = ("signal", "request", "steps")
"""How a stop is named in `stopped.json`, the first that applies; also the order of `votes`."""
URGENT = ("signal", "request")
"""Reasons that do not wait for an evaluation to end: who asks may kill after a grace."""


class StopAgreed(Exception):
    """Leaves an evaluation on all ranks at once; the run then stops with a checkpoint."""

    def __init__(self, reason: str) -> None:
        """Keep one of `REASONS`."""
        super().__init__(reason)
        self.reason = reason


class StopWatch:
    """Collects reasons to stop on this rank while its block runs; the ranks then agree."""

    def __init__(self, run_dir: Path, rank: int, stop_after_steps: int | None) -> None:
        """Watch for the stops of one run.

        Args:
            run_dir: Where rank 0 looks for the stop file.
            rank: This rank.
            stop_after_steps: Stop once this many steps of the run are done; None never.
        """
        self._file = run_dir / STOP_FILE
        self._rank = rank
        self._stop_after_steps = stop_after_steps
        self._has_signal = False
        self._before: dict[int, Any] = {}

    def votes(self, step: int) -> list[float]:
        """Give 1.0 for each of `REASONS` that this rank sees after `step` steps, else 0.0."""
        has_request = self._rank == 0 and self._file.exists()
        is_done = self._stop_after_steps is not None and step >= self._stop_after_steps
        return [float(self._has_signal), float(has_request), float(is_done)]

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only; under Ray ranks run in another one.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note_signal)
        return self

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._has_signal = True
        # The same signal once more ends the process at once.
        signal.signal(number, signal.SIG_DFL)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def first_reason(votes: list[float]) -> str | None:
    """Name the first reason that any rank voted for, given the votes summed over the ranks."""
    return next((name for name, count in zip(REASONS, votes, strict=True) if count > 0), None)
