"""Hosts for the tests of a file."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.machines import Machine, machines


@pytest.fixture(scope="module")
def hosts(request: pytest.FixtureRequest) -> Iterator[dict[str, Machine]]:
    """The hosts that a test file names in `HOSTS`."""
    # Short, as Unix sockets stand below it.
    with machines(request.module.HOSTS, Path(tempfile.mkdtemp(prefix="h"))) as found:
        yield found
