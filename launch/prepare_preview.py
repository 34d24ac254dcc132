"""From a data config to what preparing it would read and where its shards would stand."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.prepare_view import format_bytes

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig, SourceConfig
    from pipeline.data.sources import Source

Contents = list[dict[str, str]]


def preview_facts(data: "DataConfig") -> dict[str, Any]:
    """Give what preparing would read, with which tokenizer, and where its shards would stand.

    Files are read for their fingerprint; a dataset on the hub is left alone, and what would depend
    on its contents is absent.

    Raises:
        ConfigError: A filter is unknown or its library is not installed.
        DataError: A source or the tokenizer file is missing or empty.
    """
    from pipeline.data.plan import fingerprint, plan_options
    from pipeline.data.shards import MANIFEST_NAME
    from pipeline.data.sources import build_sources

    options = plan_options(data, None if data.prepared_dir is None else {})
    described: dict[str, dict[str, Any]] = {}
    contents: dict[str, Contents] = {}
    sources = build_sources(data)
    for name, config in data.named_sources.items():
        described[name] = {"kind": config.kind, "paths": list(config.paths)}
        if not _is_on_hub(config):
            contents[name] = sources[name].contents()
            described[name] |= _sizes(config, sources[name], contents[name])
    tokenizer = f"byte-level BPE of {data.tokenizer.vocab_size} entries, trained on the source"
    facts = {"sources": described, "tokenizer": data.tokenizer.path or tokenizer}
    if data.prepared_dir is None and len(contents) < len(described):
        return {**facts, "below": str(data.output_dir)}
    place = fingerprint({**options, "contents": contents})
    directory = data.prepared_dir or (data.output_dir or Path()) / place
    is_prepared = (directory / MANIFEST_NAME).exists()
    return {**facts, "directory": str(directory), "is_prepared": is_prepared}


def preview_lines(facts: Mapping[str, Any]) -> list[str]:
    """Give the facts as lines for a person, one for each source."""
    rows = [("source", f"{name}: {_describe(told)}") for name, told in facts["sources"].items()]
    rows += [(name, value) for name, value in facts.items() if name != "sources"]
    return [f"{name:20} {value}" for name, value in rows]


def _describe(source: Mapping[str, Any]) -> str:
    place = " ".join([source["kind"], *source["paths"]])
    if "num_files" not in source:
        return f"{place}, not downloaded for a dry run"
    if not source["num_files"]:
        return place
    files = "file" if source["num_files"] == 1 else "files"
    return f"{place}, {source['num_files']:,} {files}, {format_bytes(source['file_bytes'])}"


def _is_on_hub(config: "SourceConfig") -> bool:
    return config.kind == "huggingface" and not Path(config.paths[0]).expanduser().is_dir()


def _sizes(config: "SourceConfig", source: "Source", contents: Contents) -> dict[str, int]:
    """Give the number of files and their bytes as they lie on disk or in the store."""
    if config.kind == "huggingface":
        root = Path(config.paths[0]).expanduser()
        places = {file["name"]: root / file["name"] for file in contents}
    else:
        places = {piece.name: Path(piece.path) for piece in source.pieces()}
    file_bytes = sum(_file_bytes(file, places) for file in contents)
    return {"num_files": len(contents), "file_bytes": file_bytes}


def _file_bytes(file: Mapping[str, str], places: Mapping[str, Path]) -> int:
    if "bytes" in file:
        return int(file["bytes"])
    path = places[file["name"]]
    return path.stat().st_size if path.exists() else 0
