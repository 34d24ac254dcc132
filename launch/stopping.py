"""From a signal to the launching process to ranks that stop together with a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_FILE = "stop.request"
"""A file in the run directory; rank 0 looks for it at every step."""


class StopRequest:
    """Whether the user has asked this launch to stop."""

    def __init__(self, run_dir: Path, on_event: Callable[[str], None]) -> None:
        """Forget any request that an earlier launch of the run left behind.

        Args:
            run_dir: The run directory.
            on_event: Called with a line that says what happens next.
        """
        self.is_made = False
        self._file = run_dir / STOP_FILE
        self._on_event = on_event
        self._file.unlink(missing_ok=True)

    def make(self) -> None:
        """Ask the ranks to stop after the step they are in.

        Raises:
            KeyboardInterrupt: It was asked before; the caller ends the ranks at once.
        """
        if self.is_made:
            raise KeyboardInterrupt
        self.is_made = True
        self._file.touch()
        self._on_event("stopping after this step, with a checkpoint; once more ends at once")

    def clear(self) -> None:
        """Drop the request; the launch is over."""
        self._file.unlink(missing_ok=True)


@contextmanager
def stop_on_signal(run_dir: Path, on_event: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a stop request while the block runs.

    Python delivers signals to the main thread only; in another thread they are left as they are.

    Args:
        run_dir: The run directory.
        on_event: Called with a line that says what happens next.
    """
    request = StopRequest(run_dir, on_event)

    def handle(_number: int, _frame: FrameType | None) -> None:
        request.make()

    if threading.current_thread() is not threading.main_thread():
        yield request
        request.clear()
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        request.clear()
