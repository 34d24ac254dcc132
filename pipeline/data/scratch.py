"""A directory and an environment for processes that live as long as a block of code."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_RAY_DIR = 42
"""Ray puts Unix sockets up to 65 characters below its directory, and their paths may have 107."""

RAY_EXIT_SECONDS = 5.0
"""Ray's processes write their last log lines after shutdown has returned."""


@contextmanager
def short_directory() -> Iterator[str]:
    """Make a directory with a path short enough for Ray's sockets, and remove it afterwards."""
    parent = tempfile.gettempdir()
    if len(parent) > LONGEST_RAY_DIR - len("/ray-12345678"):
        parent = "/tmp"
    directory = tempfile.mkdtemp(prefix="ray-", dir=parent)
    try:
        yield directory
    finally:
        deadline = time.monotonic() + RAY_EXIT_SECONDS
        while os.path.exists(directory) and time.monotonic() < deadline:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def python_path() -> list[str]:
    """Give the entries of PYTHONPATH."""
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
