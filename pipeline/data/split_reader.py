"""From one split to the documents that are kept, with every other record counted by its reason.

Here the policies are applied, in this order: input that cannot be read (`data.on_bad_input`), blank
documents, duplicates found before, filters. Each record ends in one count:
input = kept + dropped by reason + quarantined by reason.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, Protocol

import zstandard

from pipeline.config.data import DataConfig
from pipeline.data.documents import BadFile, BadRecord, Document, Piece, record_place
from pipeline.data.shards import commit_file
from pipeline.data.sources import Source, Split
from pipeline.errors import DataError

QUARANTINE_DIR = "quarantine"
"""Holds a JSON lines file for each split with bad input: place and reason of each record."""
DROPPED_DIR = "dropped"
"""Holds a zstd JSON lines file for each split: every dropped document, with its reason."""
BAD_REASONS = ("duplicate_id",)
"""Reasons of exclusion that are bad input, not cleaning."""

WAYS_OUT = "mend it, or have such input left out and listed by data.on_bad_input=quarantine"

RecordKey = tuple[int, int]
"""Number of the piece in its split, and of the record in the piece."""


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """What a cleaner makes of a text."""

    text: str
    """The text, possibly changed."""
    reason: str | None = None
    """Why the document is left out; None keeps it."""


class Cleaner(Protocol):
    """Applies the filters of a config."""

    def clean(self, text: str) -> Cleaned:
        """Filter one document's text."""
        ...


@dataclass(kw_only=True)
class ReadCounts:
    """What became of the records of one split."""

    input_documents: int = 0
    """Records, of pieces that could be read."""
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    bad_files: list[dict[str, str]] = field(default_factory=list)
    """Pieces left out as a whole: name, reason and message; their records are not counted."""


class SplitReader:
    """Reads one split under the policies of a config."""

    def __init__(
        self,
        split: Split,
        data: DataConfig,
        source: Source,
        cleaner: Cleaner | None = None,
        exclusions: Mapping[RecordKey, str] | None = None,
        aside_dir: Path | None = None,
    ) -> None:
        """Take the split and what is known of it.

        Args:
            split: What to read.
            data: Policies.
            source: The source of the split.
            cleaner: The filters; None keeps every document.
            exclusions: Records that are left out, with the reason.
            aside_dir: The prepared directory, to write quarantined and dropped records to; None
                writes nothing.
        """
        self.counts = ReadCounts()
        self._split = split
        self._data = data
        self._source = source
        self._cleaner = cleaner
        self._exclusions = exclusions or {}
        self._aside_dir = aside_dir
        self._bad_pieces: dict[int, BadFile] = {}

    def leave_out(self, piece_number: int, error: BadFile) -> None:
        """Leave out a piece from now on.

        Raises:
            BadFile: The policy is to fail.
        """
        if self._data.on_bad_input == "fail":
            raise BadFile(error.reason, f"{error}; {WAYS_OUT}") from error
        self._bad_pieces[piece_number] = error

    def documents(self) -> Iterator[tuple[RecordKey, Document]]:
        """Yield the kept documents, each with its place, counting from zero.

        Raises:
            BadPiece: A piece turned out bad; `leave_out` it, undo what came of this call, and call
                again.
            DataError: A record is bad and the policy is to fail.
        """
        self.counts = ReadCounts()
        with _Aside.opened(self._aside_dir, self._split.index, self._data) as aside:
            for number, piece in enumerate(self._split.pieces):
                if number in self._bad_pieces:
                    self._count_bad_file(piece, self._bad_pieces[number], aside)
                    continue
                try:
                    yield from self._documents_of(number, piece, aside)
                except BadFile as exc:
                    raise BadPiece(number, exc) from exc

    def _documents_of(
        self, number: int, piece: Piece, aside: "_Aside"
    ) -> Iterator[tuple[RecordKey, Document]]:
        for ordinal, record in enumerate(self._source.read(piece)):
            self.counts.input_documents += 1
            if isinstance(record, BadRecord):
                self._quarantine(record, aside)
                continue
            reason = self._exclusions.get((number, ordinal))
            if reason in BAD_REASONS:
                where = record_place(piece, ordinal)
                detail = f"the id {record.id!r} has been given before"
                self._quarantine(BadRecord(reason=reason, where=where, detail=detail), aside)
                continue
            kept = record
            if record.is_blank:
                reason = "empty"
            if reason is None and self._cleaner is not None:
                cleaned = self._cleaner.clean(record.text)
                kept, reason = replace(record, parts=(cleaned.text,)), cleaned.reason
            if reason is not None:
                self.counts.dropped[reason] += 1
                aside.drop(record, reason)
                continue
            del record
            yield (number, ordinal), kept
            del kept  # no name may hold a long text while the next one is read

    def _quarantine(self, record: BadRecord, aside: "_Aside") -> None:
        if self._data.on_bad_input == "fail":
            raise DataError(f"{record}; {WAYS_OUT}")
        self.counts.quarantined[record.reason] += 1
        aside.quarantine(record.reason, record.where, record.detail)

    def _count_bad_file(self, piece: Piece, error: BadFile, aside: "_Aside") -> None:
        self.counts.bad_files.append(
            {"name": piece.name, "reason": error.reason, "message": str(error)}
        )
        aside.quarantine(error.reason, piece.path, str(error))


class BadPiece(Exception):
    """A piece of a split cannot be trusted, and documents of it have been yielded already."""

    def __init__(self, number: int, error: BadFile) -> None:
        """Take the piece's number in its split and what is wrong with it."""
        super().__init__(str(error))
        self.number = number
        self.error = error


class _Aside:
    """The two files beside the shards, each made when its first line comes."""

    def __init__(self, directory: Path | None, index: int, data: DataConfig) -> None:
        self._directory = directory
        self._name = f"split-{index:05d}.jsonl"
        self._keeps_dropped = data.clean.keep_dropped
        self._streams: dict[str, tuple[IO[bytes], Any, Path]] = {}

    @classmethod
    @contextmanager
    def opened(cls, directory: Path | None, index: int, data: DataConfig) -> Iterator["_Aside"]:
        aside = cls(directory, index, data)
        with ExitStack() as stack:
            stack.callback(aside.discard)
            yield aside
            aside.commit()

    def quarantine(self, reason: str, where: str, detail: str) -> None:
        line = {"reason": reason, "where": where, "detail": detail}
        self._write(QUARANTINE_DIR, "", line)

    def drop(self, document: Document, reason: str) -> None:
        if self._keeps_dropped:
            line = {"reason": reason, "source": document.source, "id": document.id}
            self._write(DROPPED_DIR, ".zst", {**line, "text": document.text})

    def _write(self, kind: str, suffix: str, line: dict[str, str]) -> None:
        if self._directory is None:
            return
        if kind not in self._streams:
            path = self._directory / kind / f"{self._name}{suffix}"
            path.parent.mkdir(exist_ok=True)
            # Renamed or removed when the split ends.
            stream = NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)  # noqa: SIM115
            writer = zstandard.ZstdCompressor().stream_writer(stream, closefd=False)
            self._streams[kind] = (stream, writer if suffix else stream, path)
        self._streams[kind][1].write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def commit(self) -> None:
        """Give the files their names."""
        for stream, writer, path in self._streams.values():
            if writer is not stream:
                writer.close()
            stream.flush()
            commit_file(stream.fileno(), Path(stream.name), path)
            stream.close()
        self._streams = {}

    def discard(self) -> None:
        """Remove what has not been committed."""
        for stream, _, _ in self._streams.values():
            stream.close()
            Path(stream.name).unlink(missing_ok=True)
