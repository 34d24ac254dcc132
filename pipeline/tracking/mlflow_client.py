"""From a tracking URI to an MLflow client that is quiet, gives up early and says why it failed."""

import fcntl
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pipeline.errors import TrackingError
from pipeline.tracking.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE_PREFIX = "sqlite:///"
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_TRUNCATE_LONG_VALUES": "true",
}
"""Set where the user has set nothing: by default one call to a dead server takes 247 s."""
QUIET_LOGGERS = ("mlflow", "alembic", "urllib3")


def default_uri(output_dir: Path) -> str:
    """Give the URI of the store that stands beside the runs: SQLite in the output directory."""
    return sqlite_uri(output_dir.absolute() / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """Give the URI of an SQLite file; the characters that a URI would swallow are quoted."""
    text = str(path)
    for character in "%?#":
        text = text.replace(character, f"%{ord(character):02X}")
    return SQLITE_PREFIX + text


def sqlite_path(uri: str) -> Path | None:
    """Give the file of an SQLite URI, or None for any other URI."""
    if not uri.startswith(SQLITE_PREFIX):
        return None
    return Path(unquote(uri.removeprefix(SQLITE_PREFIX))).absolute()


def artifact_root(uri: str) -> Path | None:
    """Give the directory of artifacts beside an SQLite store; a server decides for itself."""
    path = sqlite_path(uri)
    return None if path is None else path.parent / "mlartifacts"


@contextmanager
def connected(uri: str, on_event: Callable[[str], None]) -> "Iterator[MlflowClient]":
    """Open a tracking store for the block, and turn what MLflow raises there into our own error.

    Args:
        uri: `sqlite:///PATH`, or the address of a server.
        on_event: Told when something takes long.

    Raises:
        TrackingError: The store or the artifact storage cannot be reached, or refuses.
    """
    path = sqlite_path(uri)
    if path is not None:
        if not path.exists():
            on_event(f"creating the tracking store {path}; the first time takes some seconds")
        _check_sqlite(path)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, SQLAlchemyError, OSError) as exc:
        reason = redact(str(exc).strip().split("\n", 1)[0])
        raise TrackingError(f"tracking store {redact(uri)}: {reason}") from exc


@contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Keep other processes that hold the same directory out of the block, waiting for them.

    Two writers could create a run twice, or both migrate a new database.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _check_sqlite(path: Path) -> None:
    """MLflow retries a file that cannot be opened for 102 s; this tells at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=5.0)) as database:
            database.execute("PRAGMA schema_version").fetchone()
    except (sqlite3.Error, OSError) as exc:
        raise TrackingError(f"cannot open the tracking store {path}: {exc}") from exc
