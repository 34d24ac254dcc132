"""From a source config to splits of the source, and from a split to its documents.

A split is a set of files, byte ranges or rows that one task reads. How a source is cut depends on
the source alone, so that shards do not depend on the machine.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, cast

from pipeline.config.data import SourceConfig
from pipeline.data import SOURCES
from pipeline.data.documents import (
    Document,
    Piece,
    checked_text,
    made_id,
    read_jsonl,
    read_text,
)
from pipeline.data.text_files import SourceFile, cut_at_lines, file_sha256, find_files
from pipeline.errors import DataError

SPLIT_BYTES = 64 << 20
"""Source bytes of one task: seconds of work, and a shard of some 30 MB."""
SPLIT_ROWS = 10_000
"""Rows of a dataset in one task."""
EMBEDDED_DOCUMENT_BYTES = 4096
"""Tiny Shakespeare is one file; documents of this size make a split by document possible."""
TRAINING_CHARACTERS = 64 << 20
"""Text that a tokenizer is trained on at most, spread evenly over the splits of the source."""
CHECKED_CHARACTERS = 1 << 18
"""Text of the first documents on which the fast encoder must equal the reference."""
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md")


@dataclass(frozen=True, kw_only=True)
class Split:
    """What one task reads; `index` numbers its shards."""

    index: int
    pieces: tuple[Piece, ...]


class Source(Protocol):
    """Where documents come from."""

    def contents(self) -> list[dict[str, str]]:
        """Give name and sha256 of everything the documents are made from.

        Raises:
            DataError: The source is missing or empty.
        """
        ...

    def splits(self) -> list[Split]:
        """Cut the source into the parts that tasks read."""
        ...

    def read(self, split: Split) -> Iterator[Document]:
        """Yield the documents of one split in order.

        Raises:
            DataError: The text is malformed; the message names file and line.
        """
        ...


class JsonlSource:
    """JSON lines: a document is an object with a text field."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config

    def contents(self) -> list[dict[str, str]]:
        """Give name and sha256 of each file."""
        return _file_digests(self._files())

    def splits(self) -> list[Split]:
        """Cut large plain files at line borders and gather small ones."""
        pieces = [
            Piece(path=file.path, name=file.name, start=start, stop=stop, first_line=line)
            for file in self._files()
            for start, stop, line in cut_at_lines(file, SPLIT_BYTES)
        ]
        return _gather(pieces, SPLIT_BYTES)

    def read(self, split: Split) -> Iterator[Document]:
        """Yield a document for each line that is not blank."""
        for piece in split.pieces:
            yield from read_jsonl(piece, self._config.text_column, self._config.id_column or "")

    def _files(self) -> list[SourceFile]:
        return find_files(_location(self._config), JSONL_SUFFIXES)


class TextSource:
    """Plain text: a document is a file, or a part of one where `document_bytes` is set."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config

    def contents(self) -> list[dict[str, str]]:
        """Give name and sha256 of each file."""
        return _file_digests(self._files())

    def splits(self) -> list[Split]:
        """Gather files."""
        return _gather(_whole(self._files()), SPLIT_BYTES)

    def read(self, split: Split) -> Iterator[Document]:
        """Yield the documents of each file."""
        for piece in split.pieces:
            yield from read_text(piece, self._config.document_bytes)

    def _files(self) -> list[SourceFile]:
        return find_files(_location(self._config), TEXT_SUFFIXES)


class EmbeddedSource:
    """The two small corpora inside this package; each is a split of its own."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config

    def contents(self) -> list[dict[str, str]]:
        """Give name and sha256 of each file."""
        return _file_digests(self._files())

    def splits(self) -> list[Split]:
        """Give a split for each file."""
        return _gather(_whole(self._files()), limit=0)

    def read(self, split: Split) -> Iterator[Document]:
        """Yield chapters of novels, and Tiny Shakespeare cut at speeches."""
        for piece in split.pieces:
            if piece.name.endswith(".txt"):
                yield from read_text(piece, EMBEDDED_DOCUMENT_BYTES)
            else:
                yield from read_jsonl(piece, "text", "id")

    def _files(self) -> list[SourceFile]:
        corpus = str(Path(__file__).parent / "corpus")
        return find_files(corpus, (".txt", ".jsonl"))


class HuggingFaceSource:
    """A Hugging Face dataset: a hub name, a `save_to_disk` directory, or one of data files."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config

    def contents(self) -> list[dict[str, str]]:
        """Give the files of a local dataset; one from the hub is known by the text of its rows."""
        location = _location(self._config)
        directory = Path(location).expanduser()
        if directory.is_dir():
            return _file_digests(find_files(location, ("",)))
        digest = hashlib.sha256()
        for document in self._rows(0, len(self._load()), location):
            digest.update(json.dumps([document.id, document.text]).encode())
        return [{"name": location, "sha256": digest.hexdigest()}]

    def splits(self) -> list[Split]:
        """Cut the rows."""
        location = _location(self._config)
        num_rows = len(self._load())
        if num_rows == 0:
            raise DataError(f"split {self._config.split!r} of dataset {location} has no rows")
        name = Path(location).name
        starts = range(0, num_rows, SPLIT_ROWS)
        stops = [*starts[1:], num_rows]
        pieces = [
            Piece(path=location, name=name, start=start, stop=stop)
            for start, stop in zip(starts, stops, strict=True)
        ]
        return _gather(pieces, SPLIT_ROWS)

    def read(self, split: Split) -> Iterator[Document]:
        """Yield a document for each row."""
        for piece in split.pieces:
            yield from self._rows(piece.start, piece.stop, piece.name)

    def _rows(self, start: int, stop: int, name: str) -> Iterator[Document]:
        config = self._config
        dataset = self._load()
        if config.text_column not in dataset.column_names:
            raise DataError(
                f"dataset {config.path} has no column {config.text_column!r}; "
                f"set data.source.text_column to one of {dataset.column_names}"
            )
        columns = [c for c in (config.text_column, config.id_column) if c in dataset.column_names]
        for row, record in enumerate(
            dataset.select_columns(columns).select(range(start, stop)), start
        ):
            text = record[config.text_column]
            where = f"dataset {config.path}, row {row}, column {config.text_column!r}"
            given = record.get(config.id_column) if config.id_column else None
            document_id = made_id(name, row) if given is None else str(given)
            yield Document(id=document_id, text=checked_text(text, where), source=name)

    def _load(self) -> Any:
        import datasets

        config = self._config
        location = _location(config)
        directory = Path(location).expanduser()
        was_disabled = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            if not any((directory / n).is_file() for n in ("state.json", "dataset_dict.json")):
                local = str(directory) if directory.is_dir() else location
                return datasets.load_dataset(local, split=config.split)
            loaded = datasets.load_from_disk(str(directory))
        except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as exc:
            # RuntimeError: a dataset that comes as a script, which `datasets` runs no more.
            raise DataError(
                f"cannot load split {config.split!r} of dataset {location}: {exc}"
            ) from exc
        finally:
            if not was_disabled:
                datasets.enable_progress_bars()
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if config.split not in loaded:
            raise DataError(
                f"dataset {location} has no split {config.split!r}; "
                f"set data.source.split to one of {list(loaded)}"
            )
        return loaded[config.split]


def build_source(config: SourceConfig) -> Source:
    """Build the source that `config.kind` names."""
    module, name = SOURCES[config.kind].split(":")
    return cast(Source, getattr(import_module(module), name)(config))


def absolute_source(config: SourceConfig) -> SourceConfig:
    """Give the config with a local path made absolute: workers may stand in another directory."""
    paths = [Path(path).expanduser() for path in config.paths]
    if not paths or not all(path.exists() for path in paths):
        return config
    return config.model_copy(update={"path": tuple(str(path.absolute()) for path in paths)})


def sample_documents(source: Source, splits: list[Split]) -> Iterator[Document]:
    """Yield the beginning of every split, to train a tokenizer on."""
    for split in splits:
        yield from _head(source.read(split), TRAINING_CHARACTERS // len(splits))


def first_texts(source: Source, splits: list[Split]) -> list[str]:
    """Give the beginning of a source, to compare encoders on."""
    documents = chain.from_iterable(map(source.read, splits))
    return [document.text for document in _head(documents, CHECKED_CHARACTERS)]


def _head(documents: Iterable[Document], num_characters: int) -> Iterator[Document]:
    for document in documents:
        yield replace(document, text=document.text[:num_characters])
        num_characters -= len(document.text)
        if num_characters <= 0:
            return


def _location(config: SourceConfig) -> str:
    (location,) = config.paths
    return location


def _whole(files: Iterable[SourceFile]) -> list[Piece]:
    return [Piece(path=f.path, name=f.name, start=0, stop=f.num_bytes) for f in files]


def _gather(pieces: list[Piece], limit: int) -> list[Split]:
    groups: list[list[Piece]] = []
    weight = 0
    for piece in pieces:
        weight += piece.weight
        if not groups or weight > limit:
            groups.append([])
            weight = piece.weight
        groups[-1].append(piece)
    return [Split(index=i, pieces=tuple(group)) for i, group in enumerate(groups)]


def _file_digests(files: Iterable[SourceFile]) -> list[dict[str, str]]:
    return [{"name": file.name, "sha256": file_sha256(Path(file.path))} for file in files]
