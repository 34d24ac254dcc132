"""Documents, ids and errors of each source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import DataConfig, SourceConfig
from pipeline.data import SOURCES, sources
from pipeline.data.documents import Document, Piece, made_id, trusted
from pipeline.data.jsonl import read_jsonl
from pipeline.data.sources import build_source, build_sources, check_listed, plan_splits
from pipeline.data.storage import file_sha256, find_files
from pipeline.data.text_files import cut_file
from pipeline.errors import DataError

CORPUS = Path(sources.__file__).parent / "corpus"


def read_all(**config: Any) -> list[Document]:
    source = build_source(SourceConfig(**config), max_document_bytes=1 << 20)
    return [d for piece in source.pieces() for d in trusted(source.read(piece))]


def test_every_kind_of_the_config_has_a_source() -> None:
    kinds = SourceConfig.model_fields["kind"].annotation
    assert set(SOURCES) == set(kinds.__args__)


def test_the_embedded_corpus_is_what_its_readme_says() -> None:
    readme = (CORPUS / "README.md").read_text()
    for name in ("tinyshakespeare.txt", "classics.jsonl.zst"):
        assert f"{file_sha256(CORPUS / name)}  {name}" in readme
    documents = read_all(kind="embedded")
    plays = [d for d in documents if d.source == "tinyshakespeare.txt"]
    assert len(documents) - len(plays) == 68
    assert f"one file | {len(plays)}, see below" in readme
    assert "".join(d.text for d in plays).encode() == (CORPUS / "tinyshakespeare.txt").read_bytes()
    assert len({d.id for d in documents}) == len(documents)


def test_text_is_cut_behind_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "one\ntwo\n\nthree\r\n\r\nfour\nfive\n \nsix"
    (tmp_path / "a.txt").write_text(text, newline="")
    expected = ["one\ntwo\n\n", "three\r\n\r\n", "four\nfive\n \n", "six"]
    for document_bytes, parts in ((8, expected), (10**6, [text])):
        documents = read_all(kind="text", path=str(tmp_path), document_bytes=document_bytes)
        assert [d.text for d in documents] == parts


def test_jsonl_keeps_given_ids_and_makes_others_from_name_and_place(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    records = [{"id": "a", "text": "x"}, "", {"id": 7, "text": "y"}, {"id": None, "text": "z"}]
    path = write_jsonl(tmp_path / "c.jsonl", [*records, {"text": "w"}])
    documents = read_all(kind="jsonl", path=str(path))
    lines = path.read_bytes().split(b"\n")
    starts = [sum(len(line) + 1 for line in lines[:n]) for n in (3, 4)]
    made = [made_id("c.jsonl", start) for start in starts]
    assert [d.id for d in documents] == ["a", "7", *made]
    assert [d.text for d in documents] == ["x", "y", "z", "w"]


def test_ids_do_not_depend_on_where_the_corpus_stands(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    ids = []
    for place in ("one", "two"):
        write_jsonl(tmp_path / place / "sub" / "c.jsonl", [{"text": "x"}])
        ids.append([d.id for d in read_all(kind="jsonl", path=str(tmp_path / place))])
    assert ids[0] == ids[1]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_other_columns_and_compression_give_the_same_documents(
    tmp_path: Path, write_jsonl: Callable[..., Path], suffix: str
) -> None:
    path = write_jsonl(tmp_path / f"c.jsonl{suffix}", [{"key": "k", "body": "\u4f60 text"}])
    documents = read_all(kind="jsonl", path=str(path), text_column="body", id_column="key")
    assert [(d.id, d.text) for d in documents] == [("k", "\u4f60 text")]


def test_the_ranges_of_a_file_give_its_documents(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": f"text {i}"} for i in range(100)])
    whole = read_all(kind="jsonl", path=str(path))
    (file,) = find_files(str(path), (".jsonl",), "data.source.path")
    parts = [
        document
        for start, stop in cut_file(file, 200)
        for document in read_jsonl(
            Piece(path=file.path, name=file.name, start=start, stop=stop, weight_bytes=0),
            "text",
            "id",
            1 << 20,
            field="data.source",
        )
    ]
    assert parts == whole


BAD_LINES = {
    "no text": ('{"id": "b", "body": "x"}', r"no field 'text', it has \['body', 'id'\]"),
    "cut": ('{"id": "b", "text": "x', "invalid JSON"),
    "list": ('["text"]', "a list, not an object"),
    "number": ('{"text": 12}', "'text' holds a int, not text"),
    "null": ('{"text": null}', "'text' holds a NoneType, not text"),
    "surrogate": ('{"text": "a\\ud800b"}', "half of a surrogate pair"),
    "nested": ('{"text": ' + "[" * 100_000, "invalid JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_bad_line_is_named_by_file_and_number(
    tmp_path: Path, write_jsonl: Callable[..., Path], case: str, suffix: str
) -> None:
    line, message = BAD_LINES[case]
    path = write_jsonl(tmp_path / f"c.jsonl{suffix}", [{"text": "good"}, "", line, {"text": "x"}])
    with pytest.raises(DataError, match=rf"c\.jsonl{suffix}:3: .*{message}"):
        read_all(kind="jsonl", path=str(path))


def test_bytes_that_are_not_utf8_are_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:2: not UTF-8"):
        read_all(kind="jsonl", path=str(tmp_path))
    (tmp_path / "c.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(DataError, match=r"c\.txt:3: not UTF-8"):
        read_all(kind="text", path=str(tmp_path))


def test_a_text_file_is_a_document_unless_it_is_to_be_cut(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffb\r\n\r\nc".encode())
    (tmp_path / "a.txt").write_text("a")
    assert [d.text for d in read_all(kind="text", path=str(tmp_path))] == ["a", "b\r\n\r\nc"]
    cut = read_all(kind="text", path=str(tmp_path), document_bytes=1)
    assert [d.text for d in cut] == ["a", "b\r\n\r\n", "c"]
    assert len({d.id for d in cut}) == 3


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_a_file_that_comes_or_goes_between_hashing_and_cutting_is_refused(
    tmp_path: Path, kind: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    suffix = {"text": "txt"}.get(kind, kind)
    for name in "ab":
        path = tmp_path / f"{name}.{suffix}"
        if kind == "parquet":
            pq.ParquetWriter(path, pa.schema([("text", pa.string())])).close()
            assert pq.ParquetFile(path).num_row_groups == 0
        else:
            path.write_text('{"text": "x"}\n')
    data = DataConfig.model_validate({"sources": {"web": {"kind": kind, "path": str(tmp_path)}}})
    sources = build_sources(data)
    contents = {"web": sources["web"].contents()}
    check_listed(data, plan_splits(sources), contents)
    (tmp_path / f"a.{suffix}").rename(tmp_path / f"c.{suffix}")
    with pytest.raises(DataError, match=rf"2 files of data\.sources\.web\.path .* a\.{suffix};"):
        check_listed(data, plan_splits(sources), contents)
    if kind == "parquet":
        assert [r for p in sources["web"].pieces() for r in sources["web"].read(p)] == []


def test_small_files_share_a_split_and_large_ones_are_cut(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    for i in range(3):
        write_jsonl(tmp_path / f"small{i}.jsonl", [{"text": "x"}])
    (tmp_path / "large.jsonl").write_text((json.dumps({"text": "y" * 2000}) + "\n") * 40_000)
    source = build_source(SourceConfig(kind="jsonl", path=str(tmp_path)), 1 << 20)
    splits = plan_splits({"made": source})
    assert [[piece.name for piece in split.pieces] for split in splits] == [
        ["large.jsonl"],
        ["large.jsonl", "small0.jsonl", "small1.jsonl", "small2.jsonl"],
    ]
    assert [split.index for split in splits] == [0, 1]
    assert splits[0].pieces[0].stop == splits[1].pieces[0].start
