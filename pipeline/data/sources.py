"""From a data config to its sources, and from sources to the splits that tasks read.

A split is a number of pieces of one source: files, ranges of files, row groups. How a source is cut
depends on the source alone, so that shards do not depend on the machine.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from pipeline.config.data import DataConfig, SourceConfig
from pipeline.data import SOURCES
from pipeline.data.documents import BadFile, Piece, Record
from pipeline.data.storage import SourceFile, local_copy_name
from pipeline.data.text_files import cut_file
from pipeline.errors import DataError

FILE_KINDS = ("jsonl", "parquet", "text")
"""Kinds whose pieces and contents are both named by files."""
SPLIT_BYTES = 64 << 20
"""Source bytes of one task: seconds of work, and a shard of some 30 MB."""
TEXT_COMPRESSION = 4
"""Bytes of text behind one byte of a compressed file, about, to give tasks equal work."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """What one task reads; `index` numbers its shards."""

    index: int
    source: str
    """Name of the source in the config."""
    pieces: tuple[Piece, ...]


class Source(Protocol):
    """Where documents come from; built from its config, the longest document's bytes, and its name
    in the config, which messages give: `data.source` or `data.sources.NAME`."""

    def contents(self) -> list[dict[str, str]]:
        """Give name and sha256, or a store's own version, of all that documents are made from.

        Raises:
            DataError: The source is missing or empty.
        """
        ...

    def pieces(self) -> list[Piece]:
        """Cut the source into what can be read apart, in its order.

        Raises:
            DataError: The source is missing or empty.
        """
        ...

    def read(self, piece: Piece) -> Iterator[Record]:
        """Yield the documents of a piece in order, and in their places what is none.

        Raises:
            BadFile: None of the piece's documents can be trusted, those yielded included.
            DataError: It cannot be read for a reason that lies outside the source.
        """
        ...


def build_source(
    config: SourceConfig, max_document_bytes: int, field: str = "data.source"
) -> Source:
    """Build the source that `config.kind` names.

    Args:
        config: The source.
        max_document_bytes: UTF-8 bytes of the longest document.
        field: Where the source stands in the config, for messages.
    """
    module, name = SOURCES[config.kind].split(":")
    return cast(Source, getattr(import_module(module), name)(config, max_document_bytes, field))


def build_sources(data: DataConfig) -> dict[str, Source]:
    """Build all sources of a config, by name; nothing is opened."""
    return {
        name: build_source(config, data.max_document_bytes, data.source_field(name))
        for name, config in data.named_sources.items()
    }


def plan_splits(sources: Mapping[str, Source]) -> list[Split]:
    """Cut all sources into splits, each of one source, numbered from 0 in the sources' order.

    Raises:
        DataError: A source is missing or empty.
    """
    groups = [
        (name, group)
        for name, source in sources.items()
        for group in _gather(source.pieces(), SPLIT_BYTES)
    ]
    return [
        Split(index=index, source=name, pieces=tuple(group))
        for index, (name, group) in enumerate(groups)
    ]


def check_listed(
    data: DataConfig, splits: Iterable[Split], contents: Mapping[str, list[dict[str, str]]]
) -> None:
    """Refuse splits of other files than those whose contents were told before.

    Hashing a large corpus takes minutes, in which a directory may change.

    Args:
        data: The config.
        splits: What the sources were cut into.
        contents: What each source said of its contents.

    Raises:
        DataError: A file came or went in between.
    """
    cut: dict[str, set[str]] = {name: set() for name in contents}
    for split in splits:
        cut[split.source].update(piece.name for piece in split.pieces)
    for name, entries in contents.items():
        if data.named_sources[name].kind not in FILE_KINDS:
            continue
        if changed := sorted(cut[name] ^ {entry["name"] for entry in entries}):
            raise DataError(
                f"{len(changed)} files of {data.source_field(name)}.path came or went while the "
                f"others were hashed, such as {changed[0]}; prepare again once all are there"
            )


def pinned_sources(data: DataConfig, contents: Mapping[str, list[dict[str, str]]]) -> DataConfig:
    """Give the config as tasks need it: local paths absolute, hub datasets at one commit.

    Args:
        data: The config.
        contents: What each source said of its contents.
    """
    pinned = {name: _pinned(source, contents[name]) for name, source in data.named_sources.items()}
    if data.sources:
        return data.model_copy(update={"sources": pinned})
    return data.model_copy(update={"source": next(iter(pinned.values()))})


def file_pieces(files: Iterable[SourceFile], limit: int, border: bytes | None) -> list[Piece]:
    """Give pieces for files: ranges of large plain ones, all others whole.

    Args:
        files: The files.
        limit: Bytes of a range, about.
        border: Bytes behind which a range may begin; None cuts nothing.
    """
    pieces = []
    for file in files:
        if border is None or file.is_missing:
            pieces.append(whole_piece(file))
            continue
        try:
            ranges = cut_file(file, limit, border)
        except BadFile as exc:
            # It was there when the files were listed.
            pieces.append(replace(whole_piece(file), flaw=(exc.reason, str(exc))))
            continue
        for start, stop in ranges:
            weight = (stop - start) * (TEXT_COMPRESSION if file.is_compressed else 1)
            pieces.append(
                Piece(path=file.path, name=file.name, start=start, stop=stop, weight_bytes=weight)
            )
    return pieces


def whole_piece(file: SourceFile) -> Piece:
    """Give the piece that is a whole file, with a flaw if the file is missing."""
    return Piece(
        path=file.path,
        name=file.name,
        start=0,
        stop=file.num_bytes,
        weight_bytes=file.num_bytes * (TEXT_COMPRESSION if file.is_compressed else 1),
        flaw=("missing_file", f"{file.path} does not exist") if file.is_missing else None,
    )


def _pinned(config: SourceConfig, contents: list[dict[str, str]]) -> SourceConfig:
    if config.kind == "huggingface" and not Path(config.paths[0]).expanduser().exists():
        return config.model_copy(update={"revision": contents[0]["version"]})
    paths = tuple(local_copy_name(path) for path in config.paths)
    return config.model_copy(update={"path": paths}) if paths else config


def _gather(pieces: Iterable[Piece], limit: int) -> list[list[Piece]]:
    groups: list[list[Piece]] = []
    weight = 0
    for piece in pieces:
        weight += piece.weight_bytes
        if not groups or weight > limit:
            groups.append([])
            weight = piece.weight_bytes
        groups[-1].append(piece)
    return groups
