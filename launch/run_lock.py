"""One command at a time in a run or study directory."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import LaunchError

LOCK_FILE = ".lock"


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keep other commands out of a directory while the block runs.

    The kernel drops the lock of a process that was killed.

    Args:
        directory: It exists.

    Raises:
        LaunchError: Another command works in it.
    """
    with (directory / LOCK_FILE).open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            stream.seek(0)
            raise LaunchError(
                f"another command works in {directory} ({stream.read().strip()}); "
                "wait for it, stop it with Ctrl-C, or choose another directory with name=NAME"
            ) from exc
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield
