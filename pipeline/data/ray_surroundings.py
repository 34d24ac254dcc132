"""What a Ray session needs around it: a short directory, variables, a cluster that answers."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipeline.errors import LaunchError

LONGEST_RAY_DIR = 42
"""Ray puts Unix sockets up to 65 characters below its directory, and their paths may have 107."""

RAY_EXIT_SECONDS = 5.0
"""Ray's processes write their last log lines after shutdown has returned."""

CONNECT_SECONDS = 5.0
"""Ray itself tries for minutes to reach an address that nobody listens on."""


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
def environment_set(updates: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside the block."""
    before = {name: os.environ.get(name) for name in updates}
    os.environ.update(updates)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def python_path() -> list[str]:
    """Give the entries of PYTHONPATH."""
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def check_answers(address: str) -> None:
    """Check that somebody listens at a Ray address that names host and port; others pass.

    Args:
        address: Such as `10.0.0.1:6379`, `ray://10.0.0.1:10001` or `auto`.

    Raises:
        LaunchError: Nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as exc:
        raise unreachable(address, exc) from exc


def unreachable(address: str, cause: Exception) -> LaunchError:
    """Say that a Ray cluster cannot be reached, why, and what to do."""
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return LaunchError(
        f"cannot reach the Ray cluster at {address}: {lines[0]}; start it with `ray start --head`, "
        "or unset RAY_ADDRESS and cluster.ray_address for a local one"
    )
