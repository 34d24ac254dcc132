"""From a prepared directory to the run that MLflow shows of it, and to what training runs read.

The data run and every training run on its shards share the digest of a dataset and the tag
`data_fingerprint`, so that each leads to the others.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.data import DataConfig, SourceConfig
from pipeline.config.load import RUN_FILE, STUDY_FILE
from pipeline.tracking.events import Event, read_events, surviving_events
from pipeline.tracking.notes import describe_data
from pipeline.tracking.redaction import PLACEHOLDER, redact
from pipeline.tracking.replica import (
    DIGEST_CHARACTERS,
    Dataset,
    Replica,
    ReplicaRun,
    Status,
    event_points,
    flatten,
    identity_key,
    read_json,
    table_text,
    unix_ms,
)
from pipeline.tracking.store import PROBE_FILE

EVENTS_FILE = "events.jsonl"
MANIFEST_FILE = "manifest.json"
EXPERIMENT = "tandem/data"
PLACE_FIELDS = frozenset({"output_dir", "prepared_dir", "prepared_url"})
"""Fields of the data config that say where shards stand, not what they are."""
MAX_NAMED_FILES = 16
"""A source of more files is one dataset with a digest over all of them."""
LEFT_OUT_TABLE = "left_out.json"
INTERRUPTED = "interrupted"
"""The reason of a stop that a person asked for; any other is a failure."""
SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*)://")


def config_facts(data: DataConfig) -> dict[str, Any]:
    """Give what the log of a preparation says about its config, without credentials.

    Args:
        data: The config.
    """
    tree = data.model_dump(mode="json", exclude=set(PLACE_FIELDS))
    clean: dict[str, Any] = json.loads(redact(json.dumps(tree)))
    return {
        "name": redact("+".join(_source_names(data))),
        "places": {name: _place(source) for name, source in data.named_sources.items()},
        "data": clean,
    }


def is_prepared(directory: Path) -> bool:
    """Tell whether a directory holds the log of a preparation, finished or not."""
    others = (RUN_FILE, STUDY_FILE, PROBE_FILE)
    return (directory / EVENTS_FILE).is_file() and not any(
        (directory / name).is_file() for name in others
    )


def plan_data(prepared_dirs: Sequence[Path], is_over: bool = False) -> list[Replica]:
    """Plan the runs of prepared directories; one without a log of its own is passed over.

    Args:
        prepared_dirs: Prepared directories, finished or not; one named twice counts once.
        is_over: Nothing runs any more.

    Raises:
        TrackingError: A log or a manifest is malformed.
    """
    distinct = sorted({directory.absolute() for directory in prepared_dirs})
    runs = {path: _plan_run(path, is_over) for path in distinct if is_prepared(path)}
    return [
        Replica(experiment=EXPERIMENT, parent=None, children=(run,), shared_dir=path)
        for path, run in runs.items()
        if run is not None
    ]


def read_shards(data: DataConfig, fingerprint: str | None) -> Dataset | None:
    """Give the shards that a training run reads; None if nothing tells which.

    Args:
        data: The run's config, with `prepared_dir`.
        fingerprint: Of the shards, as far as the run's result tells it: they may be gone.
    """
    prepared_dir = data.prepared_dir
    manifest = read_json(prepared_dir / MANIFEST_FILE) if prepared_dir else None
    digest = (manifest or {}).get("fingerprint") or fingerprint
    if digest is None:
        return None
    return Dataset(
        name=redact("+".join(_source_names(data))),
        digest=str(digest)[:DIGEST_CHARACTERS],
        context="training",
        source={"uri": str(prepared_dir)} if prepared_dir else {},
        profile=_profile(manifest or {}),
    )


def data_tags(shards: Dataset) -> dict[str, str]:
    """Give the tag that a data run and the training runs on its shards share."""
    return {"data_fingerprint": shards.digest}


def _plan_run(prepared_dir: Path, is_over: bool) -> ReplicaRun | None:
    """None as long as no task has begun."""
    events = surviving_events(read_events(prepared_dir / EVENTS_FILE))
    facts = next((e.values["config"] for e in reversed(events) if "config" in e.values), None)
    if facts is None:
        return None
    manifest = read_json(prepared_dir / MANIFEST_FILE)
    shards = Dataset(
        name=facts["name"],
        digest=str((manifest or {}).get("fingerprint", prepared_dir.name))[:DIGEST_CHARACTERS],
        context="prepared",
        source={"uri": str(prepared_dir)},
        profile=_profile(manifest or {}),
    )
    status = _status(events[-1], manifest is not None, is_over)
    start = unix_ms(events[0].time_unix_seconds)
    totals = next((e.values for e in reversed(events) if e.kind == "prepare"), {})
    return ReplicaRun(
        role="data",
        name=f"{shards.name}-{shards.digest}",
        key=identity_key("data", shards.digest, start),
        attempt=events[-1].attempt,
        status=status,
        start_unix_ms=start,
        end_unix_ms=None if status == "RUNNING" else unix_ms(events[-1].time_unix_seconds),
        tags={**data_tags(shards), "status": status.lower()},
        params={**flatten({"data": facts["data"]}), **_manifest_params(manifest)},
        note=describe_data(facts["name"], shards.digest, manifest, totals, events[-1].attempt),
        points=tuple(event_points(events)),
        texts={
            "data.yaml": yaml.safe_dump(facts["data"], sort_keys=False),
            LEFT_OUT_TABLE: table_text(_left_out(totals)),
        },
        table_name=LEFT_OUT_TABLE,
        datasets=() if manifest is None else (*_list_sources(facts, manifest), shards),
    )


def _status(last: Event, is_prepared: bool, is_over: bool) -> Status:
    if last.kind == "finish" and is_prepared:
        return "FINISHED"
    if last.kind == "stop":
        return "KILLED" if last.values.get("reason") == INTERRUPTED else "FAILED"
    return "FAILED" if is_over else "RUNNING"


def _manifest_params(manifest: Mapping[str, Any] | None) -> dict[str, str]:
    """What only the finished shards tell; params cannot change once they are sent."""
    if manifest is None:
        return {}
    names = ("fingerprint", "encoder", "encoder_version", "vocab_size", "dtype", "tokenizer_sha256")
    return flatten({"shards": {name: manifest.get(name) for name in names}})


def _profile(manifest: Mapping[str, Any]) -> dict[str, Any]:
    profile: dict[str, Any] = {
        f"{split}_{count}": shards[count]
        for split, shards in manifest.get("splits", {}).items()
        for count in ("tokens", "documents")
        if count in shards
    }
    if "vocab_size" in manifest:
        profile["vocab_size"] = manifest["vocab_size"]
    return profile


def _left_out(totals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each reason; what is quarantined is documents, and files left out whole."""
    return [
        {"what": what, "reason": reason, "number": number}
        for what in ("dropped", "quarantined")
        for reason, number in totals.get(what, {}).items()
    ]


def _list_sources(facts: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[Dataset]:
    """One dataset for each file, or for each source that has many."""
    datasets = []
    recipe = manifest["recipe"]
    for name, files in recipe["contents"].items():
        place = facts["places"][name]
        if not 0 < len(files) <= MAX_NAMED_FILES:
            # Made-up words have no file: what they are made from stands in their options.
            described = files or [recipe["sources"][name]]
            datasets.append(_source_dataset(name, described, place, ", ".join(place["paths"])))
            continue
        for file in files:
            uri = _file_uri(place["paths"], str(file["name"]))
            datasets.append(_source_dataset(str(file["name"]), [file], place, uri))
    return datasets


def _source_dataset(
    name: str, files: Sequence[Mapping[str, Any]], place: Mapping[str, Any], uri: str
) -> Dataset:
    return Dataset(
        name=redact(name),
        digest=_digest_files(files)[:DIGEST_CHARACTERS],
        context="source",
        source_type=place["source_type"],
        source={"path" if place["source_type"] == "hugging_face" else "uri": uri},
        profile={"num_files": len(files)},
    )


def _digest_files(files: Sequence[Mapping[str, Any]]) -> str:
    """Give the sha256 of the one file, else that of all that the recipe says of the files."""
    if len(files) == 1 and "sha256" in files[0]:
        return str(files[0]["sha256"])
    return hashlib.sha256(json.dumps(list(files), sort_keys=True).encode()).hexdigest()


def _file_uri(paths: Sequence[str], name: str) -> str:
    """Give where a file stands: by itself, in a directory, or below the fixed part of a glob.

    Args:
        paths: Of its source, without credentials.
        name: Below the path; of several paths, behind the number of its own (`0000/`).
    """
    if len(paths) > 1:
        number, _, name = name.partition("/")
        paths = paths[int(number) :]
    parts = paths[0].rstrip("/").split("/")
    name = redact(name)
    if name in (parts[-1], paths[0]):
        return paths[0]
    fixed = takewhile(lambda part: not has_magic(part.replace(PLACEHOLDER, "")), parts)
    return "/".join([*fixed, name])


def _place(source: SourceConfig) -> dict[str, Any]:
    """Where a source stands, in the words of MLflow."""
    paths = [redact(path) for path in source.paths] or [source.kind]
    scheme = SCHEME.match(paths[0])
    kind = "local" if scheme is None else scheme.group(1)
    if source.kind == "huggingface" and not Path(paths[0]).exists():
        kind = "hugging_face"
    return {"source_type": kind, "paths": paths}


def _source_names(data: DataConfig) -> list[str]:
    return [
        name if data.sources or not source.paths else Path(source.paths[0]).name
        for name, source in data.named_sources.items()
    ]
