"""From what happens in a run to one JSON line each, and back to the surviving lineage of attempts.

`events.jsonl` is append-only and outlives attempts: a process that was killed may leave half a last
line, which readers ignore and the next writer cuts off. A number that is not finite is written as
the string `nan`, `inf` or `-inf`, so that every line is plain JSON.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from pipeline.errors import TrackingError
from pipeline.tracking.metrics import METRICS, check_metric

EventKind = Literal[
    "start", "resume", "train", "prepare", "eval", "checkpoint", "skip", "straggler", "stop",
    "abort", "finish", "system",
]  # fmt: skip
DURABLE_KINDS = ("checkpoint", "stop", "abort", "finish")
"""Kinds that are forced to disk at once: what follows them may rely on them after a power loss."""
SOURCES = "sources"
"""Field of a training event: source to samples, tokens and epochs so far, over all ranks."""
REPEATABLE_KINDS = ("train", "prepare", "eval")
"""Kinds of which one per step survives: a resumed attempt may measure its first step again."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of the event log."""

    seq: int
    """Position in the log, from 0, over all attempts."""
    attempt: int
    """Which start of the run wrote it, from 1."""
    kind: EventKind
    """What happened."""
    step: int
    """Optimizer steps done, or splits where data is prepared; for start and resume the step that
    the attempt begins from."""
    time_unix_seconds: float
    """When it happened."""
    values: Mapping[str, Any]
    """Metrics by name, and free fields whose keys hold no slash."""

    @property
    def metrics(self) -> dict[str, float]:
        """The values that are metrics."""
        return {name: float(value) for name, value in self.values.items() if name in METRICS}


class EventWriter:
    """Appends events to one file, one process at a time; use it as a context manager."""

    def __init__(self, path: Path, attempt: int) -> None:
        """Open the log for appending, after cutting off a torn last line.

        Args:
            path: The `events.jsonl` of a run; its directory must exist.
            attempt: Which start of the run this is, from 1 (`next_attempt`).

        Raises:
            TrackingError: The log holds a damaged line, or a later attempt than this one.
        """
        existing = read_events(path)
        if existing and existing[-1].attempt > attempt:
            raise TrackingError(
                f"{path} already holds attempt {existing[-1].attempt}, cannot append {attempt}"
            )
        self.path = path
        self.attempt = attempt
        self._next_seq = existing[-1].seq + 1 if existing else 0
        # Unbuffered: what is left of a line that found no room would be written behind later ones.
        self._file = path.open("ab", buffering=0)
        self._size_bytes = _complete_bytes(path)
        self._file.truncate(self._size_bytes)

    @property
    def last_seq(self) -> int:
        """Position of the last event in the log; -1 while it has none."""
        return self._next_seq - 1

    def write(self, kind: EventKind, step: int, values: Mapping[str, Any] | None = None) -> Event:
        """Append one event, stamped with the current time.

        Args:
            kind: What happened.
            step: Optimizer steps done.
            values: Metrics by name, in the units of `METRICS`, and free fields without a slash.

        Raises:
            TrackingError: The kind or a metric name is unknown, a metric is not a number, or
                another process has written to the log since this one did.
            OSError: The line could not be written; the log is as it was.
        """
        self._check_alone()
        event = Event(
            seq=self._next_seq,
            attempt=self.attempt,
            kind=kind,
            step=step,
            time_unix_seconds=time.time(),
            values=dict(values or {}),
        )
        self._append(_to_line(event))
        self._next_seq += 1
        if kind in DURABLE_KINDS:
            os.fsync(self._file.fileno())
        return event

    def _append(self, line: bytes) -> None:
        """Write a line whole; on a full disk take back what of it found room."""
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(self._size_bytes)
            raise
        self._size_bytes += written

    def _check_alone(self) -> None:
        """Refuse to write behind the events of a process that took the run over."""
        size_bytes = os.fstat(self._file.fileno()).st_size
        if size_bytes != self._size_bytes:
            raise TrackingError(
                f"{self.path} has {size_bytes} bytes and this process left {self._size_bytes}: "
                "another process took the run over while this one did not answer. End one of the "
                "two"
            )

    def close(self) -> None:
        """Force the log to disk and close it."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_events(path: Path) -> list[Event]:
    """Read all events of a log in order; a missing log has none, a torn last line does not count.

    Raises:
        TrackingError: A complete line is not an event; file and line number are named.
    """
    if not path.exists():
        return []
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    lines = complete.split(b"\n") if complete else []
    return [_from_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def surviving_events(events: Iterable[Event]) -> list[Event]:
    """Give the events that the run's final state descends from.

    An attempt that starts or resumes at step s replaces what earlier attempts did after s. Of two
    train or eval events at one step the later one stays.
    """
    lineage: list[Event] = []
    for event in events:
        if event.kind in ("start", "resume"):
            lineage = [e for e in lineage if e.attempt == event.attempt or e.step <= event.step]
        lineage.append(event)
    last = {(e.kind, e.step): e.seq for e in lineage}
    return [e for e in lineage if e.kind not in REPEATABLE_KINDS or last[e.kind, e.step] == e.seq]


def next_attempt(path: Path) -> int:
    """Give the number of the attempt that starts now: one above the last in the log, from 1."""
    events = read_events(path)
    return events[-1].attempt + 1 if events else 1


def _complete_bytes(path: Path) -> int:
    """Bytes up to and with the last newline."""
    return path.read_bytes().rfind(b"\n") + 1


def _to_line(event: Event) -> bytes:
    if event.kind not in get_args(EventKind):
        raise TrackingError(f"unknown event kind {event.kind!r}; known: {get_args(EventKind)}")
    tree = {**vars(event), "values": {k: _encode(k, v) for k, v in event.values.items()}}
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _encode(name: str, value: Any) -> Any:
    if "/" not in name:
        return value
    check_metric(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TrackingError(f"metric {name} is {value!r}, not a number; leave out what is missing")
    return value if math.isfinite(value) else str(float(value))


def _from_line(line: bytes, origin: str) -> Event:
    try:
        event = Event(**json.loads(line))
        values = {k: float(v) if k in METRICS else v for k, v in event.values.items()}
    except (ValueError, TypeError, AttributeError) as exc:
        raise TrackingError(f"{origin} is not an event: {exc}") from exc
    return Event(**{**vars(event), "values": values})
