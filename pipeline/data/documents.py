"""From a piece of a file to its documents: JSON lines, or plain text whole or in parts."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.data.text_files import COMPRESSED_SUFFIXES, read_chunks, split_lines
from pipeline.errors import DataError

TEXT_COMPRESSION = 4
"""Bytes of text behind one byte of a compressed file, about, to give tasks equal work."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text with the id that decides its split."""

    id: str
    text: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of one file or dataset: bytes of a plain file, all of a compressed one, or rows."""

    path: str
    name: str
    start: int
    stop: int
    first_line: int = 1

    @property
    def weight(self) -> int:
        """Bytes of text, guessed for a compressed file, or rows."""
        ratio = TEXT_COMPRESSION if self.path.endswith(COMPRESSED_SUFFIXES) else 1
        return ratio * (self.stop - self.start)


def read_jsonl(piece: Piece, text_column: str, id_column: str) -> Iterator[Document]:
    """Yield the documents of a JSON lines file or of a part of one that begins at a line.

    Raises:
        DataError: A line is not JSON, not an object, or has no text; the message names the line.
    """
    lines = split_lines(read_chunks(piece.path, piece.start, piece.stop))
    for number, line in enumerate(lines, piece.first_line):
        if not line.strip():
            continue
        where = f"{piece.path}:{number}"
        try:
            record = json.loads(line)
        except UnicodeDecodeError as exc:
            raise DataError(f"{where}: not UTF-8 text: {exc.reason}") from exc
        except (ValueError, RecursionError) as exc:
            raise DataError(f"{where}: invalid JSON: {exc}") from exc
        if not isinstance(record, dict):
            raise DataError(f"{where}: a {type(record).__name__}, not an object with a text field")
        if text_column not in record:
            raise DataError(
                f"{where}: no field {text_column!r}, it has {sorted(record)[:20]}; "
                "set data.source.text_column"
            )
        text = checked_text(record[text_column], f"{where}: field {text_column!r}")
        given = record.get(id_column)
        document_id = made_id(piece.name, number) if given is None else str(given)
        yield Document(id=document_id, text=text, source=piece.name)


def read_text(piece: Piece, document_bytes: int | None) -> Iterator[Document]:
    """Yield a text file as one document, or cut at blank lines.

    Raises:
        DataError: The file is not UTF-8.
    """
    data = b"".join(read_chunks(piece.path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise DataError(f"{piece.path}:{line}: not UTF-8 text: {exc.reason}") from exc
    texts = [text] if document_bytes is None else cut_at_blank_lines(text, document_bytes)
    for ordinal, part in enumerate(texts):
        yield Document(id=made_id(piece.name, ordinal), text=part, source=piece.name)


def cut_at_blank_lines(text: str, document_bytes: int) -> Iterator[str]:
    """Cut text behind the first blank line after each `document_bytes`; joined, it is the text."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= document_bytes and not line.strip():
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def made_id(name: str, ordinal: int) -> str:
    """Give the id of a document that has none: the hash of where it stands."""
    return hashlib.sha256(f"{name}\n{ordinal}".encode()).hexdigest()


def checked_text(text: object, where: str) -> str:
    """Give `text` if it is text that UTF-8 can hold.

    Raises:
        DataError: It is not; the message begins with `where`.
    """
    if not isinstance(text, str):
        raise DataError(f"{where} holds a {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"{where} holds half of a surrogate pair, which is not text") from exc
    return text
