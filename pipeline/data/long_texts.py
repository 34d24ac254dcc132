"""From the bytes of a long text to the text in parts, so that no more than a part is held twice.

Python keeps a text with one character beyond U+FFFF at four bytes a character, all of it: a text of
200 MB would take 800 MB. In parts, only the part with that character does.
"""

import re
from collections.abc import Iterator

import msgspec
import orjson

Buffer = bytes | bytearray | memoryview

LONG_BYTES = 8 << 20
"""Shorter texts stay whole: the work of cutting would be for nothing."""
PART_BYTES = 1 << 20
"""A part is cut at the first place behind these."""

JSON_CUT = re.compile(rb"[ \xc2-\xf4]|\\u(?!d[c-f])", re.IGNORECASE)
"""Before a space, a character outside ASCII, or an escape by number that is no second half of a
pair: none of them stands within an escape or a character."""


def decode_parts(data: Buffer, part_bytes: int = PART_BYTES) -> Iterator[str]:
    """Decode UTF-8 in parts that are the text when joined.

    Args:
        data: UTF-8.
        part_bytes: Size of a part, about.

    Raises:
        UnicodeDecodeError: It is none; the place is that in `data`.
    """
    view = memoryview(data)
    start = 0
    while start < len(view):
        stop = min(start + part_bytes, len(view))
        while stop < len(view) and view[stop] & 0xC0 == 0x80 and stop - start < part_bytes + 4:
            stop += 1
        try:
            yield str(view[start:stop], "utf-8")
        except UnicodeDecodeError as exc:
            exc.start += start
            exc.end += start
            raise
        start = stop


def json_fields(line: Buffer) -> dict[str, memoryview] | None:
    """Give the fields of a JSON object as the JSON that they are written in, nothing copied.

    Returns:
        None where the line is no such object.
    """
    try:
        fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return {name: memoryview(raw) for name, raw in fields.items()}


def json_string_parts(written: memoryview, part_bytes: int = PART_BYTES) -> Iterator[str]:
    """Decode a JSON string in parts that are the text when joined.

    Args:
        written: The string as JSON, quotes included.
        part_bytes: Size of a part, about.

    Raises:
        orjson.JSONDecodeError: It is no valid string.
    """
    inside = written[1:-1]
    start = 0
    while start < len(inside):
        stop = _json_cut(inside, start + part_bytes)
        part: str = orjson.loads(b'"%b"' % bytes(inside[start:stop]))
        yield part
        start = stop


def _json_cut(inside: memoryview, target: int) -> int:
    for found in JSON_CUT.finditer(inside, target):
        place = found.start()
        # Behind an odd number of backslashes stands the rest of an escape, of a backslash say.
        if _backslashes_before(inside, place) % 2 == 0:
            return place
    return len(inside)


def _backslashes_before(inside: memoryview, place: int) -> int:
    first = place
    while first > 0 and inside[first - 1] == ord("\\"):
        first -= 1
    return place - first
