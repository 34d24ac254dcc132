"""From signals to the launching process to ranks that stop together with a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_FILE = "stop.request"
"""A file in the run directory; rank 0 looks for it at every step."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the user has asked this command to stop; one for all runs of a command."""

    def __init__(self, on_event: Callable[[str], None]) -> None:
        """Begin without a request.

        Args:
            on_event: Called with a line that says what a request leads to.
        """
        self.is_made = False
        self.on_event = on_event
        self._run_dir: Path | None = None
        self._is_listening = False

    def make(self) -> None:
        """Ask for a stop: of the run that ranks are in, and of whatever would come after it.

        Raises:
            KeyboardInterrupt: It was asked before; the caller ends the ranks at once.
        """
        if self.is_made:
            raise KeyboardInterrupt
        self.is_made = True
        if self._run_dir is None:
            self.on_event("stopping once this is done; once more ends at once")
        elif is_probe(self._run_dir):
            self.on_event("stopping this probe; it starts over the next time")
        else:
            (self._run_dir / STOP_FILE).touch()
            self.on_event("stopping after this step, with a checkpoint; once more ends at once")

    @contextmanager
    def reaching(self, run_dir: Path) -> Iterator[None]:
        """Let a request reach the ranks of a run while the block runs, also one made before.

        Args:
            run_dir: The run directory; a request that an earlier launch left there is dropped.
        """
        file = run_dir / STOP_FILE
        self._run_dir = run_dir
        file.unlink(missing_ok=True)
        if self.is_made and not is_probe(run_dir):
            file.touch()
        self.listen_again()
        try:
            yield
        finally:
            self._run_dir = None
            file.unlink(missing_ok=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a request while the block runs.

        Python delivers signals to the main thread only; elsewhere they are left as they are.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._is_listening = True
        try:
            self.listen_again()
            yield
        finally:
            self._is_listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen_again(self) -> None:
        """Take the signals back from whoever took them since: `ray.init` takes SIGTERM."""
        if self._is_listening:
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.make()


def is_probe(run_dir: Path) -> bool:
    """Tell whether a run directory holds a probe, which has nothing to save when it is stopped."""
    return (run_dir / "probe.yaml").is_file()
