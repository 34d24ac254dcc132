"""From what preparing reports to the event log of the prepared directory, and on to MLflow.

MLflow is never in the way of preparing: short work is sent once it is done, long work by a process
beside it that yields to the tokenization.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from launch.sync_process import SyncProcess
from pipeline.config.data import DataConfig
from pipeline.data.progress import PrepareEvent, PrepareTotals
from pipeline.errors import PipelineError, TrackingError
from pipeline.tracking.events import EventWriter, next_attempt, read_events
from pipeline.tracking.redaction import redact
from pipeline.tracking.replica_data import EVENTS_FILE, INTERRUPTED, config_facts

EVENT_SECONDS = 1.0
"""Least time between two events, so that many small splits do not make a long log."""
FOLLOW_AFTER_SECONDS = 60.0
"""Tokenization that takes longer is replayed while it goes on."""
NICENESS = 15
"""Of the process that replays: loading MLflow takes seconds of a core that tasks could use."""
MAX_REASON_CHARACTERS = 500
COUNTED = (
    "data/documents",
    "data/tokens",
    "data/dropped_documents",
    "data/quarantined",
)


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
        self._written: tuple[float, ...] = ()
        self._written_at = -math.inf

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
        path = self._log.path
        try:
            self._close(self._log, error)
        except OSError as exc:
            # A full disk has failed the block as well: then its own error is the one to be told.
            if error is None:
                raise TrackingError(f"cannot write {path}: {exc.strerror or exc}") from exc
        if self._uri is not None:
            self._send(path.parent, self._uri, error)

    def _open(self, directory: Path, totals: PrepareTotals) -> None:
        path = directory / EVENTS_FILE
        step = totals.num_splits_done
        before = [e for e in read_events(path) if e.kind == "prepare" and e.step <= step]
        if before:
            self._written = _counts(before[-1].step, before[-1].values)
        self._log = EventWriter(path, next_attempt(path))
        facts = {"config": config_facts(self._data), "num_splits": totals.num_splits}
        self._log.write("resume" if step else "start", step, facts)

    def _close(self, log: EventWriter, error: BaseException | None) -> None:
        num_done = self._latest.num_splits_done if self._latest else 0
        with log:
            self._write()
            if error is None:
                log.write("finish", num_done)
            else:
                log.write("stop", num_done, {"reason": _reason(error)})

    def _write(self) -> None:
        """Write the latest totals, unless they have been written, by this attempt or before it."""
        if self._log is None or self._latest is None or not self._latest.num_splits_done:
            return
        step, values = self._latest.num_splits_done, event_values(self._latest)
        if _counts(step, values) == self._written:
            return
        self._log.write("prepare", step, values)
        self._written = _counts(step, values)
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
        "data/quarantined": sum(totals.quarantined.values()),
    }
    return {
        **{name: value for name, value in metrics.items() if value is not None},
        "dropped": _by_reason(totals.dropped_documents),
        "quarantined": _by_reason(totals.quarantined),
        "num_files_done": totals.num_files_done,
        "seconds": totals.seconds,
    }


def _counts(step: int, values: Mapping[str, Any]) -> tuple[float, ...]:
    """What two events must share to say the same."""
    return (step, *(float(values[name]) for name in COUNTED))


def _by_reason(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    kind = error.kind if isinstance(error, PipelineError) else type(error).__name__
    return redact(f"{kind}: {error}")[:MAX_REASON_CHARACTERS]


def _send_once(directory: Path, uri: str, on_event: Callable[[str], None]) -> str | None:
    """Send a finished preparation; give why it did not go through."""
    from pipeline.tracking.mlflow_sync import sync

    try:
        sync(directory, uri, on_event=on_event)
    except PipelineError as exc:
        return str(exc)
    return None
