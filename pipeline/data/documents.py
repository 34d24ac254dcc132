"""What a source is made of: pieces that tasks read, the documents in them, and what is not one."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.errors import DataError

ENCODED_CHARACTERS = 1 << 20
"""Characters encoded at a time where only the size of a text is wanted."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text with the id that decides its split."""

    id: str
    parts: tuple[str, ...]
    """The text; a long one in several parts, so that it need not be held as one."""
    source: str
    """Name of the file or dataset that it stands in."""
    has_given_id: bool = False
    """Whether the source gave the id; a made one cannot stand twice."""

    @property
    def text(self) -> str:
        """The whole text; of a long one a copy."""
        return self.parts[0] if len(self.parts) == 1 else "".join(self.parts)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return sum(map(utf8_bytes, self.parts))

    @property
    def num_characters(self) -> int:
        """Characters of the text."""
        return sum(map(len, self.parts))

    @property
    def is_blank(self) -> bool:
        """Whether the text is empty or whitespace alone."""
        return all(not part or part.isspace() for part in self.parts)

    def beginning(self, num_characters: int) -> str:
        """Give the first characters, as many as there are of so many."""
        taken = ""
        for part in self.parts:
            taken += part[: num_characters - len(taken)]
            if len(taken) == num_characters:
                break
        return taken


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that is no document: what is wrong with it, and where it stands."""

    reason: str
    """One word of those that docs/data.md lists."""
    where: str
    """File or dataset, and line, byte or row."""
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"


class BadFile(DataError):
    """A file, or a piece of one, of which no document can be trusted."""

    def __init__(self, reason: str, message: str) -> None:
        """Take the reason, as `BadRecord` has it, and a message that names the file."""
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadFile"], tuple[str, str]]:
        return BadFile, (self.reason, str(self))


Record = Document | BadRecord


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a record stands, for ids and for people."""

    source: str
    """The file's or dataset's name below the source's root."""
    ordinal: int
    """What tells the record from others in the file: its first byte, or its row."""
    where: Callable[[], str]
    """Says file and line or row; asked only where something is wrong, for it may count lines."""
    field: str = ""
    """Which field or column of the record is looked at."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of one file or dataset, read by one task from its start to its end."""

    path: str
    """Local path, URL, or name of a dataset."""
    name: str
    """The path below the source's root, so that moving a corpus keeps ids."""
    start: int
    """First byte, row, row group or shard, as the kind of source counts."""
    stop: int
    """One behind the last; a compressed file is one piece from 0 to its size."""
    weight_bytes: int
    """Bytes of text, about, to give tasks equal work."""
    flaw: tuple[str, str] | None = None
    """Reason and message if the file was missing or damaged when the source was cut: it stays left
    out, for a file that appears later was not cut and is not in the digest of the source."""

    def check_readable(self) -> None:
        """Refuse a piece with a flaw.

        Raises:
            BadFile: It has one.
        """
        if self.flaw is not None:
            raise BadFile(*self.flaw)


def made_id(name: str, ordinal: int) -> str:
    """Give the id of a document that has none: the hash of where it stands.

    Args:
        name: The file below the source's root.
        ordinal: What tells it from others in the file: first byte of a line, or row.
    """
    return hashlib.sha256(f"{name}\n{ordinal}".encode()).hexdigest()


def record_place(piece: Piece, ordinal: int) -> str:
    """Say where a record stands that can be read: its number from 1, in its part of the file.

    Args:
        piece: The file, or the part of one.
        ordinal: The record's number in the piece, from 0.
    """
    part = f" from {piece.start} on" if piece.start else ""
    return f"{piece.path}{part}, record {ordinal + 1}"


def utf8_bytes(text: str) -> int:
    """Give the size of a text in UTF-8, with no copy of all of it.

    Raises:
        UnicodeEncodeError: It holds half of a surrogate pair.
    """
    if text.isascii():
        return len(text)
    starts = range(0, len(text), ENCODED_CHARACTERS)
    return sum(len(text[start : start + ENCODED_CHARACTERS].encode()) for start in starts)


def check_document(text: object, given_id: object, place: Place, limit_bytes: int) -> Record:
    """Make a document of what a record holds, or say why it is none.

    Args:
        text: What stands in the text field; a long text may come as a tuple of its parts.
        given_id: What stands in the id field; None makes an id.
        place: Where the record stands.
        limit_bytes: UTF-8 bytes of the longest document.
    """
    parts = text if isinstance(text, tuple) else (text,)
    if not all(isinstance(part, str) for part in parts):
        detail = f"{place.field} holds a {type(text).__name__}, not text".lstrip()
        reason = "no_text" if text is None else "not_text"
        return BadRecord(reason=reason, where=place.where(), detail=detail)
    try:
        num_bytes = sum(map(utf8_bytes, parts))
    except UnicodeEncodeError:
        detail = f"{place.field} holds half of a surrogate pair, which is not text".lstrip()
        return BadRecord(reason="lone_surrogate", where=place.where(), detail=detail)
    if num_bytes > limit_bytes:
        return too_large(place.where(), num_bytes, limit_bytes)
    return Document(
        id=made_id(place.source, place.ordinal) if given_id is None else str(given_id),
        parts=parts,
        source=place.source,
        has_given_id=given_id is not None,
    )


def too_large(where: str, num_bytes: int, limit_bytes: int) -> BadRecord:
    """Say that a document is longer than the config allows."""
    detail = (
        f"a document of {num_bytes:,} bytes or more is longer than "
        f"data.max_document_bytes={limit_bytes:,}; raise it, or cut the document"
    )
    return BadRecord(reason="too_large", where=where, detail=detail)


def trusted(records: Iterator[Record]) -> Iterator[Document]:
    """Yield documents until one is bad.

    Raises:
        DataError: A record is no document.
    """
    for record in records:
        if isinstance(record, BadRecord):
            raise DataError(str(record))
        yield record
