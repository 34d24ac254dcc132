"""The text source: a document is a file, a line, or a part of a file cut at blank lines."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from pipeline.config.data import SourceConfig
from pipeline.data.documents import BadRecord, Piece, Place, Record, check_document, too_large
from pipeline.data.long_texts import LONG_BYTES, decode_parts
from pipeline.data.sources import SPLIT_BYTES, file_pieces
from pipeline.data.storage import SourceFile, describe_contents, find_all
from pipeline.data.text_files import (
    BYTE_ORDER_MARK,
    Line,
    LongLine,
    read_chunks,
    split_lines,
    where_of,
)

SUFFIXES = (".txt", ".text", ".md")


class TextSource:
    """Plain UTF-8 text; a byte order mark at the start of a file is not part of it."""

    def __init__(self, config: SourceConfig, max_document_bytes: int, field: str) -> None:
        self._config = config
        self._limit_bytes = max_document_bytes
        self._field = field

    def contents(self) -> list[dict[str, str]]:
        """Give what tells each file's contents."""
        return describe_contents(self._files())

    def pieces(self) -> list[Piece]:
        """Give whole files, and ranges of large plain ones where a file is not one document."""
        config = self._config
        files = self._files()
        if config.document == "line":
            return file_pieces(files, SPLIT_BYTES, border=b"\n")
        border = None if config.document_bytes is None else b"\n\n"
        return file_pieces(files, SPLIT_BYTES, border=border)

    def read(self, piece: Piece) -> Iterator[Record]:
        """Yield the documents of a file or range.

        Raises:
            BadFile: The file's bytes cannot be trusted.
        """
        piece.check_readable()
        if self._config.document == "line":
            return read_lines(piece, self._limit_bytes)
        if self._config.document_bytes is not None:
            return read_parts(piece, self._config.document_bytes, self._limit_bytes)
        return read_whole(piece, self._limit_bytes)

    def _files(self) -> list[SourceFile]:
        return find_all(self._config.paths, SUFFIXES, f"{self._field}.path")


def read_whole(piece: Piece, limit_bytes: int) -> Iterator[Record]:
    """Yield a file as one document.

    Args:
        piece: The file.
        limit_bytes: UTF-8 bytes of the longest document; no more than that is held.

    Raises:
        BadFile: The file's bytes cannot be trusted.
    """
    data, size = bytearray(), 0
    for chunk in read_chunks(piece.path, piece.start, piece.stop):
        size += len(chunk)
        if size > limit_bytes + len(BYTE_ORDER_MARK):
            data = bytearray()
        else:
            data += chunk
    if size > limit_bytes + len(BYTE_ORDER_MARK):
        yield too_large(piece.path, size, limit_bytes)
    else:
        yield _decode(data, piece, 0, 0, limit_bytes)


def read_lines(piece: Piece, limit_bytes: int) -> Iterator[Record]:
    """Yield each line that is not blank, without its end, as a document.

    Raises:
        BadFile: The file's bytes cannot be trusted.
    """
    position = piece.start
    chunks = read_chunks(piece.path, piece.start, piece.stop)
    for number, line in enumerate(split_lines(chunks, limit_bytes)):
        begin = position
        if isinstance(line, LongLine):
            position += line.num_bytes + 1
            yield too_large(where_of(piece, number), line.num_bytes, limit_bytes)
            continue
        position += len(line) + 1
        text = line.removesuffix(b"\r")
        if text.strip():
            yield _decode(text, piece, begin, number, limit_bytes)


def read_parts(piece: Piece, document_bytes: int, limit_bytes: int) -> Iterator[Record]:
    """Yield parts of a file, each cut behind the first blank line after `document_bytes`.

    Joined, the parts are the text.

    Args:
        piece: The file, or a range that begins behind a blank line.
        document_bytes: Size of a part, about.
        limit_bytes: UTF-8 bytes of the longest document; no more than that is held.

    Raises:
        BadFile: The file's bytes cannot be trusted.
    """
    part = _Part(begin=piece.start, first_line=0)
    chunks = read_chunks(piece.path, piece.start, piece.stop)
    for number, line in enumerate(split_lines(chunks, limit_bytes, keep_ends=True), 1):
        part.add(line, limit_bytes)
        is_blank = not isinstance(line, LongLine) and not line.strip()
        if is_blank and part.num_bytes >= document_bytes:
            yield part.record(piece, limit_bytes)
            part = _Part(begin=part.begin + part.num_bytes, first_line=number)
    if part.num_bytes:
        yield part.record(piece, limit_bytes)


@dataclass(kw_only=True)
class _Part:
    """A part as it grows; beyond the limit only its size is kept."""

    begin: int
    first_line: int
    num_bytes: int = 0
    lines: list[Line] = field(default_factory=list)

    def add(self, line: Line | LongLine, limit_bytes: int) -> None:
        self.num_bytes += line.num_bytes if isinstance(line, LongLine) else len(line)
        if isinstance(line, LongLine) or self.num_bytes > limit_bytes:
            self.lines.clear()
        else:
            self.lines.append(line)

    def record(self, piece: Piece, limit_bytes: int) -> Record:
        if self.num_bytes > limit_bytes:
            return too_large(where_of(piece, self.first_line), self.num_bytes, limit_bytes)
        return _decode(b"".join(self.lines), piece, self.begin, self.first_line, limit_bytes)


def _decode(data: Line, piece: Piece, begin: int, first_line: int, limit_bytes: int) -> Record:
    """Make a document of bytes that begin at byte `begin` and line `first_line` of the piece."""
    if begin == 0 and data.startswith(BYTE_ORDER_MARK):
        data = data.removeprefix(BYTE_ORDER_MARK)
    try:
        text = data.decode() if len(data) <= LONG_BYTES else tuple(decode_parts(data))
    except UnicodeDecodeError as exc:
        where = where_of(piece, first_line + data.count(b"\n", 0, exc.start))
        detail = f"not UTF-8 text: {exc.reason}"
        return BadRecord(reason="not_utf8", where=where, detail=detail)
    place = Place(source=piece.name, ordinal=begin, where=partial(where_of, piece, first_line))
    return check_document(text, None, place, limit_bytes)
