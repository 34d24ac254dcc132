"""Long texts in parts: joined they are the text, whatever stands at a cut."""

import json
from pathlib import Path

import pytest

from pipeline.config.data import SourceConfig
from pipeline.data import long_texts
from pipeline.data.documents import BadRecord, Document
from pipeline.data.jsonl import JsonlSource
from pipeline.data.long_texts import decode_parts, json_fields, json_string_parts

STRANGE = (
    'a b \u00e9\u4f60 \U0001f469\u200d\U0001f467 \\ " \n\t \x01 \\u0041 \\\\u00e9 \ud7ff \ue000 c '
)
"""Characters of one to four bytes, escapes, and text that looks like one."""


@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize("shift", range(12))
def test_the_parts_of_a_json_string_joined_are_the_string(is_ascii: bool, shift: int) -> None:
    text = "x" * shift + STRANGE * 20
    line = json.dumps({"id": 7, "text": text}, ensure_ascii=is_ascii).encode()
    fields = json_fields(line)
    assert fields is not None
    parts = list(json_string_parts(fields["text"], 5))
    assert "".join(parts) == text
    assert len(parts) > 20
    assert bytes(fields["id"]) == b"7"


@pytest.mark.parametrize("shift", range(8))
def test_the_parts_of_utf8_joined_are_the_text(shift: int) -> None:
    text = "x" * shift + STRANGE * 20
    parts = list(decode_parts(bytearray(text.encode()), 5))
    assert "".join(parts) == text
    assert len(parts) > 20


@pytest.mark.parametrize("place", [0, 3, 7, 10, 16])
def test_a_bad_byte_is_found_at_its_place(place: int) -> None:
    data = bytearray(b"abc def " * 3)
    data[place] = 0xFF
    with pytest.raises(UnicodeDecodeError) as caught:
        list(decode_parts(data, 5))
    assert caught.value.start == place


@pytest.mark.parametrize("line", [b"[1]", b"7", b'{"a": 1', b'{"a": 1} x', b""])
def test_what_is_no_object_has_no_fields(line: bytes) -> None:
    assert json_fields(line) is None


def read_one(path: Path) -> Document | BadRecord:
    source = JsonlSource(SourceConfig(kind="jsonl", path=str(path)), 1 << 30, "data.source")
    (piece,) = source.pieces()
    (record,) = source.read(piece)
    return record


LONG = STRANGE * (long_texts.LONG_BYTES // len(STRANGE.encode()) + 1)


def test_a_long_line_gives_the_same_document_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": "one", "text": LONG}))
    document = read_one(path)
    assert isinstance(document, Document)
    assert len(document.parts) > 4
    assert (document.id, document.text) == ("one", LONG)
    assert document.num_characters == len(LONG)
    assert document.beginning(3_000_000) == LONG[:3_000_000]
    assert not document.is_blank


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "' + b"a b " * (3 << 20) + b'\xff"}', "not_utf8"),
        (b'{"text": "' + b"a b " * (3 << 20) + b'\\ud800 x"}', "lone_surrogate"),
        (b'{"text": "' + b"a b " * (3 << 20) + b'\\q"}', "invalid_json"),
        (b'{"text": [1], "more": "' + b"a b " * (3 << 20) + b'"}', "not_text"),
        (b'{"other": "' + b"a b " * (3 << 20) + b'"}', "no_text"),
        (b'["' + b"a b " * (3 << 20) + b'"]', "not_an_object"),
    ],
)
def test_a_long_line_is_bad_for_the_same_reasons_as_a_short_one(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(line + b"\n")
    record = read_one(path)
    assert isinstance(record, BadRecord)
    assert record.reason == reason
    path.write_bytes(line.replace(b"a b " * (3 << 20), b"a b ") + b"\n")
    short = read_one(path)
    assert isinstance(short, BadRecord)
    assert short.reason == reason


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "[1, Infinity]"])
def test_numbers_that_python_writes_and_json_lacks_are_read(tmp_path: Path, number: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": "one", "text": "x", "score": {number}}}\n')
    document = read_one(path)
    assert isinstance(document, Document)
    assert (document.id, document.text) == ("one", "x")
