"""What MLflow shows, as plain values: runs with points, texts and tags; nothing is sent here."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import TrackingError
from pipeline.tracking.events import Event
from pipeline.tracking.redaction import redact
from pipeline.tracking.store import RESULT_FILE

TEXT_FILES = (
    "run.yaml", "probe.yaml", "study.yaml", "environment.json", "report.md", "report.html",
    RESULT_FILE,
)  # fmt: skip
"""Files kept as artifacts, as far as they are there."""

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Role = Literal["study", "training", "probe", "summary", "data"]
DatasetContext = Literal["training", "source", "prepared"]
DIGEST_CHARACTERS = 36
"""Longest dataset digest that MLflow takes."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of one metric."""

    name: str
    value: float
    step: int
    time_unix_ms: int


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Data that a run read or made."""

    name: str
    digest: str
    """At most `DIGEST_CHARACTERS` long."""
    context: DatasetContext
    """What the run did with it: trained on it, tokenized it, or wrote it."""
    source_type: str = "local"
    """What MLflow calls the kind of place."""
    source: Mapping[str, str]
    """The place, in the fields that its kind has; `uri` for most."""
    profile: Mapping[str, Any]
    """Counts for display."""


@dataclass(frozen=True, kw_only=True)
class ReplicaRun:
    """One MLflow run as it should be."""

    role: Role
    name: str
    key: str = ""
    """What tells this run from another in the same place, such as one started anew."""
    attempt: int = 1
    status: Status
    start_unix_ms: int
    end_unix_ms: int | None
    tags: Mapping[str, str]
    params: Mapping[str, str] = field(default_factory=dict)
    note: str
    """Description in Markdown."""
    points: tuple[Point, ...] = ()
    """In the order of sending; while a run goes on, only the end grows."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Artifacts by file name."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Artifacts that are sent as they are, by their path among the artifacts."""
    table_name: str | None = None
    """The artifact that is a table of records."""
    datasets: tuple[Dataset, ...] = ()

    @property
    def slot(self) -> str:
        """Place of the run below its parent."""
        return f"{self.role}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Replica:
    """What one directory becomes: children of one parent, or single runs without one."""

    experiment: str
    parent: ReplicaRun | None
    children: tuple[ReplicaRun, ...]
    shared_dir: Path | None = None
    """A directory that other commands may send at the same time, to be locked meanwhile."""


def unix_ms(seconds: float) -> int:
    """Give a time in the unit of MLflow."""
    return round(seconds * 1000)


def event_points(events: Iterable[Event]) -> Iterator[Point]:
    """Give the metrics of events, at the time of their event, and where an attempt began."""
    for event in events:
        values = {name: value for name, value in event.values.items() if "/" in name}
        if event.kind in ("start", "resume"):
            values.setdefault("progress/attempt", float(event.attempt))
        time_unix_ms = unix_ms(event.time_unix_seconds)
        for name, value in values.items():
            yield Point(name=name, value=value, step=event.step, time_unix_ms=time_unix_ms)


def identity_key(*parts: object) -> str:
    """Give a key that tells a run from others, from what makes it itself."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:32]


def table_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Give records as JSON in the layout of MLflow's table artifacts."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    rows = [[record.get(name) for name in columns] for record in records]
    return json.dumps({"columns": columns, "data": rows})


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Give a nested mapping as dotted names and redacted text; None is left out."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif value is not None:
            flat[name] = redact(value if isinstance(value, str) else json.dumps(value))
    return flat


def read_texts(directory: Path) -> dict[str, str]:
    """Read the files of a directory that become artifacts, redacted, by name."""
    paths = [directory / name for name in TEXT_FILES]
    return {path.name: redact(path.read_text("utf-8")) for path in paths if path.is_file()}


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file.

    Raises:
        TrackingError: The file holds something else.
    """
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_bytes())
    except ValueError as exc:
        raise TrackingError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(tree, dict):
        raise TrackingError(f"{path} must hold an object, got {type(tree).__name__}")
    return tree
