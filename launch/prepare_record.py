"""From what preparing reports to the event log of the prepared directory, and on to MLflow.

MLflow is never in the way of preparing: short work is sent once it is done, long work by a process
beside it that yields to the tokenization.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from launch.sync_process import SyncProcess
from pipeline.config.data import DataConfig
from pipeline.data.progress import PrepareEvent, PrepareTotals
from pipeline.errors import PipelineError, TrackingError
from pipeline.tracking.events import EventWriter, next_attempt
from pipeline.tracking.redaction import redact
from pipeline.tracking.replica_data import EVENTS_FILE, INTERRUPTED, config_facts

EVENT_SECONDS = 1.0
"""Least time between two events, so that many small splits do not make a long log."""
FOLLOW_AFTER_SECONDS = 60.0
"""Tokenization that takes longer is replayed while it goes on."""
NICENESS = 15
"""Of the process that replays: loading MLflow takes seconds of a core that tasks could use."""
MAX_REASON_CHARACTERS = 500


class PrepareRecorder:
    """Writes the log of one preparation; use it as a context manager around `prepare`.

    A block that prepares nothing, because the shards are there, writes nothing.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        uri: str | None,
        on_event: Callable[[str], None],
        event_seconds: float = EVENT_SECONDS,
    ) -> None:
        """Begin without a log; the first totals tell where it stands.

        Args:
            data: The config that is prepared.
            uri: MLflow tracking URI to send to; None leaves that to a later `sync`.
            on_event: Told when MLflow lacks something at the end.
            event_seconds: Least time between two events.
        """
        self._data = data
        self._uri = uri
        self._say = on_event
        self._event_seconds = event_seconds
        self._log: EventWriter | None = None
        self._sync: SyncProcess | None = None
        self._latest: PrepareTotals | None = None
        self._written_steps = 0
        self._written_at = 0.0

    def take(self, event: PrepareEvent) -> None:
        """Write what an event counts.

        Raises:
            TrackingError: The log cannot be written, or an older one is damaged.
        """
        totals = event.totals
        if totals is None or event.directory is None:
            return
        if self._log is None and event.is_finished:
            return
        self._latest = totals
        try:
            if self._log is None:
                self._open(event.directory, totals)
            elif time.monotonic() - self._written_at >= self._event_seconds:
                self._write()
        except OSError as exc:
            raise TrackingError(
                f"cannot write {event.directory / EVENTS_FILE}: {exc.strerror or exc}"
            ) from exc
        if self._sync is None and self._uri and totals.seconds >= FOLLOW_AFTER_SECONDS:
            self._sync = SyncProcess(event.directory, self._uri, niceness=NICENESS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the log with how it ended, and let MLflow have the rest."""
        if self._log is None:
            return
        with self._log as log:
            if error is None:
                self._write()
                log.write("finish", self._written_steps)
            else:
                log.write("stop", self._written_steps, {"reason": _reason(error)})
        if self._uri is not None:
            self._send(log.path.parent, self._uri, error)

    def _open(self, directory: Path, totals: PrepareTotals) -> None:
        path = directory / EVENTS_FILE
        self._log = EventWriter(path, next_attempt(path))
        step = self._written_steps = totals.num_splits_done
        facts = {"config": config_facts(self._data), "num_splits": totals.num_splits}
        self._log.write("resume" if step else "start", step, facts)

    def _write(self) -> None:
        """Write the latest totals, unless they have been written."""
        totals = self._latest
        if self._log is None or totals is None or totals.num_splits_done <= self._written_steps:
            return
        self._log.write("prepare", totals.num_splits_done, event_values(totals))
        self._written_steps = totals.num_splits_done
        self._written_at = time.monotonic()

    def _send(self, directory: Path, uri: str, error: BaseException | None) -> None:
        problem = None
        if self._sync is not None and isinstance(error, KeyboardInterrupt):
            self._sync.end()
        elif self._sync is not None:
            problem = self._sync.drain()
        elif error is None:
            problem = _send_once(directory, uri, self._say)
        if problem is not None:
            self._say(f"MLflow lacks something; send it with: python -m launch sync {directory}")
            self._say(problem)


def event_values(totals: PrepareTotals) -> dict[str, Any]:
    """Give totals as metrics by name, with the reasons beside them; what is not known is absent."""
    text_tokens = totals.tokens - totals.documents
    metrics = {
        "data/documents": totals.documents,
        "data/text_bytes": totals.text_bytes,
        "data/tokens": totals.tokens,
        "data/text_bytes_per_second": totals.text_bytes_per_second,
        "data/tokens_per_second": totals.tokens_per_second,
        "data/bytes_per_token": totals.text_bytes / text_tokens if text_tokens else None,
        "data/dropped_documents": sum(totals.dropped_documents.values()),
        "data/quarantined_documents": sum(totals.quarantined_documents.values()),
    }
    return {
        **{name: value for name, value in metrics.items() if value is not None},
        "dropped": _by_reason(totals.dropped_documents),
        "quarantined": _by_reason(totals.quarantined_documents),
        "num_files_done": totals.num_files_done,
        "seconds": totals.seconds,
    }


def _by_reason(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return redact(f"{type(error).__name__}: {error}")[:MAX_REASON_CHARACTERS]


def _send_once(directory: Path, uri: str, on_event: Callable[[str], None]) -> str | None:
    """Send a finished preparation; give why it did not go through."""
    from pipeline.tracking.mlflow_sync import sync

    try:
        sync(directory, uri, on_event=on_event)
    except PipelineError as exc:
        return str(exc)
    return None
