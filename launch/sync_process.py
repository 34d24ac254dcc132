"""The one process beside a study that replays its events to MLflow, paused in timed cells."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.rank_logs import last_lines

DRAIN_SECONDS = 120
"""How long the last sync may take after everything else is done."""


class SyncProcess:
    """A running `python -m launch sync DIR --follow`."""

    def __init__(self, directory: Path, uri: str, *, niceness: int = 0) -> None:
        """Start the process; its output goes to `sync.log` in the directory.

        Args:
            directory: A study, run or prepared directory that exists.
            uri: MLflow tracking URI.
            niceness: How far it stands behind other processes where cores are short, up to 19.
        """
        self._log = directory / "sync.log"
        with self._log.open("ab") as stream:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "launch", "sync", str(directory), "--follow",
                    "--while-process", str(os.getpid()), "--uri", uri,
                ],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                # Ctrl-C stops the ranks first; what they still say must be replayed as well.
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": _python_path()},
            )  # fmt: skip
        if niceness:
            os.setpriority(os.PRIO_PROCESS, self._process.pid, niceness)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the process still while something is timed."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def drain(self) -> str | None:
        """Let the process replay what is left, and end it.

        Returns:
            None when MLflow has everything, else why not.
        """
        self._signal(signal.SIGTERM)
        try:
            code = self._process.wait(timeout=DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self.end()
        if code == 0:
            return None
        return f"the last sync did not go through; log: {self._log}\n{last_lines(self._log)}"

    def end(self) -> None:
        """End the process at once; what MLflow lacks stays on disk."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)


@contextmanager
def syncing(directory: Path, uri: str, on_event: Callable[[str], None]) -> Iterator[SyncProcess]:
    """Replay a directory to MLflow while the block runs, and to its end afterwards.

    A block that is interrupted ends the process at once.

    Args:
        directory: A study or run directory that exists.
        uri: MLflow tracking URI.
        on_event: Told when MLflow lacks something at the end.
    """
    process = SyncProcess(directory, uri)
    try:
        yield process
    except KeyboardInterrupt:
        process.end()
        raise
    finally:
        problem = process.drain()
        if problem is not None:
            on_event(f"MLflow lacks something; send it with: python -m launch sync {directory}")
            on_event(problem)


def _python_path() -> str:
    """Give a PYTHONPATH by which the process finds this very package."""
    project = str(Path(__file__).resolve().parent.parent)
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return os.pathsep.join([project, *others])
