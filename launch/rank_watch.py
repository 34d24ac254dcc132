"""From a rank that is about to train to one whose phases are followed."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.tracking.events import next_attempt
from pipeline.training.heartbeat import Heartbeat
from pipeline.training.journal import EVENTS
from pipeline.training.phases import following

DIRECTORY = ".heartbeats"


@contextmanager
def watched(run_dir: Path) -> Iterator[None]:
    """Follow this rank while the block runs.

    Args:
        run_dir: The run directory.

    Raises:
        ConfigError: The environment names a fault plan that cannot be used.
    """
    rank = int(os.environ.get("RANK", "0"))
    directory = run_dir / DIRECTORY
    directory.mkdir(exist_ok=True)
    heartbeat = Heartbeat(directory / f"{socket.gethostname()}.{rank}", rank)
    try:
        with following(run_dir, heartbeat, next_attempt(run_dir / EVENTS)):
            yield
    finally:
        heartbeat.close()
