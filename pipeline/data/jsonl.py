"""The JSON lines source: a document is an object with a text field on a line of its own."""

import json
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import orjson

from pipeline.config.data import SourceConfig
from pipeline.data.documents import BadRecord, Piece, Place, Record, check_document, too_large
from pipeline.data.long_texts import LONG_BYTES, decode_parts, json_fields, json_string_parts
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

SUFFIXES = (".jsonl", ".ndjson", ".json")
ESCAPED_RATIO = 3
"""JSON may spell each letter of two bytes as an escape of six."""
OTHER_FIELDS_BYTES = 1 << 20
"""Room in a line for all that is not the text."""


class JsonlSource:
    """JSON lines, plain, gzip or zstd; large plain files are cut at line borders."""

    def __init__(self, config: SourceConfig, max_document_bytes: int, field: str) -> None:
        self._config = config
        self._limit_bytes = max_document_bytes
        self._field = field

    def contents(self) -> list[dict[str, str]]:
        """Give what tells each file's contents."""
        return describe_contents(self._files())

    def pieces(self) -> list[Piece]:
        """Give whole files, and ranges of large plain ones."""
        return file_pieces(self._files(), SPLIT_BYTES, border=b"\n")

    def read(self, piece: Piece) -> Iterator[Record]:
        """Yield what stands on each line that is not blank.

        Raises:
            BadFile: The file's bytes cannot be trusted.
        """
        piece.check_readable()
        config = self._config
        return read_jsonl(
            piece, config.text_column, config.id_column, self._limit_bytes, field=self._field
        )

    def _files(self) -> list[SourceFile]:
        return find_all(self._config.paths, SUFFIXES, f"{self._field}.path")


def read_jsonl(
    piece: Piece, text_column: str, id_column: str | None, limit_bytes: int, *, field: str
) -> Iterator[Record]:
    """Yield the records of a JSON lines file, or of a part of one that begins at a line.

    Args:
        piece: The file or part.
        text_column: The field with the text.
        id_column: The field with the id, if there is one.
        limit_bytes: UTF-8 bytes of the longest document.
        field: The source in the config, for messages.

    Raises:
        BadFile: The file's bytes cannot be trusted.
    """
    line_limit = ESCAPED_RATIO * limit_bytes + OTHER_FIELDS_BYTES
    chunks = read_chunks(piece.path, piece.start, piece.stop)
    position = piece.start
    for number, line in enumerate(split_lines(chunks, line_limit)):
        begin = position
        place = Place(
            source=piece.name,
            ordinal=begin,
            where=partial(where_of, piece, number),
            field=f"field {text_column!r}",
        )
        if isinstance(line, LongLine):
            position += line.num_bytes + 1
            yield too_large(place.where(), line.num_bytes, limit_bytes)
            continue
        position += len(line) + 1
        if begin == 0 and line.startswith(BYTE_ORDER_MARK):
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line or line.isspace():
            continue
        parsed = _parse_long(line, text_column, id_column) or _parse(
            line, text_column, place, field
        )
        # No name may hold a long text while the next line is read.
        del line
        if isinstance(parsed, BadRecord):
            yield parsed
            continue
        given_id = None if id_column is None else parsed.get(id_column)
        record = check_document(parsed[text_column], given_id, place, limit_bytes)
        del parsed
        yield record
        del record


def _parse_long(line: Line, text_column: str, id_column: str | None) -> dict[str, Any] | None:
    """Give text, in parts, and id of a long line; None where it has to be parsed as a whole."""
    if len(line) <= LONG_BYTES:
        return None
    fields = json_fields(line)
    if fields is None:
        return None
    if bytes(fields.get(text_column, b"")[:1]) != b'"':
        return None
    try:
        parsed: dict[str, Any] = {text_column: tuple(json_string_parts(fields[text_column]))}
        if id_column is not None and id_column in fields:
            parsed[id_column] = orjson.loads(fields[id_column])
    except orjson.JSONDecodeError:
        return None
    return parsed


def _parse(line: Line, text_column: str, place: Place, field: str) -> dict[str, Any] | BadRecord:
    """Give the object on a line that has the text field, or what is wrong."""
    try:
        record = _loads(line)
    except ValueError as exc:
        reason, detail = _explain(line, exc)
        return BadRecord(reason=reason, where=place.where(), detail=detail)
    if not isinstance(record, dict):
        detail = f"a {type(record).__name__}, not an object with a text field"
        return BadRecord(reason="not_an_object", where=place.where(), detail=detail)
    if text_column not in record:
        has = sorted(record)[:20]
        detail = f"no field {text_column!r}, it has {has}; set {field}.text_column"
        return BadRecord(reason="no_text", where=place.where(), detail=detail)
    return record


def _loads(line: Line) -> Any:
    """Parse a line as orjson does, and numbers that Python's `json` writes though JSON has none.

    Raises:
        ValueError: It is no JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        if b"NaN" not in line and b"Infinity" not in line:
            raise
        return json.loads(line)


def _explain(line: Line, exc: ValueError) -> tuple[str, str]:
    """Give the reason and the detail of a line that is no JSON."""
    try:
        deque(decode_parts(line), maxlen=0)
    except UnicodeDecodeError as undecodable:
        return "not_utf8", f"not UTF-8 text: {undecodable.reason}"
    if "surrogate" in str(exc):
        return "lone_surrogate", "a field holds half of a surrogate pair, which is not text"
    return "invalid_json", f"invalid JSON: {exc}"
