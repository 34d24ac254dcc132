"""What each kind of source makes of its files: rows, lines, ranges, made-up words, paths."""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import DataConfig, SourceConfig
from pipeline.data import parquet, plain_text
from pipeline.data.documents import BadFile, BadRecord, Document, trusted
from pipeline.data.sources import Source, build_source, build_sources
from pipeline.data.storage import MissingSource
from pipeline.errors import DataError


def build(**fields: Any) -> Source:
    return build_source(SourceConfig.model_validate(fields), max_document_bytes=1 << 20)


def read_all(**fields: Any) -> list[Document]:
    source = build(**fields)
    return [d for piece in source.pieces() for d in trusted(source.read(piece))]


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int = 10**6) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def test_parquet_rows_are_documents_in_order_with_given_and_made_ids(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"key": ["a", "b"], "body": ["one", "zwei \u00df"]})
    path = str(tmp_path)
    given = read_all(kind="parquet", path=path, text_column="body", id_column="key")
    assert [(d.id, d.text) for d in given] == [("a", "one"), ("b", "zwei \u00df")]
    made = read_all(kind="parquet", path=path, text_column="body")
    assert [d.text for d in made] == ["one", "zwei \u00df"]
    assert len({d.id for d in made}) == 2


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_arrow_text_type_is_text(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa

    types = {
        "string": pa.string(), "large_string": pa.large_string(),
        "string_view": pa.string_view(), "dictionary": pa.dictionary(pa.int32(), pa.string()),
    }  # fmt: skip
    texts = ["one", "two \U0001f44d", "one"]
    write_parquet(tmp_path / "a.parquet", {"text": pa.array(texts).cast(types[kind])})
    assert [d.text for d in read_all(kind="parquet", path=str(tmp_path))] == texts


def test_row_groups_are_read_apart_and_give_what_the_file_gives(tmp_path: Path) -> None:
    texts = [f"{i} " + "x" * 1000 for i in range(100)]
    write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=7)
    source = build(kind="parquet", path=str(tmp_path))
    (file,) = source.pieces()
    whole = list(trusted(source.read(file)))
    assert [d.text for d in whole] == texts
    sizes = [7000] * 15
    groups = parquet.gather_groups(
        parquet.SourceFile(path=file.path, name=file.name, num_bytes=1), sizes, limit_bytes=20_000
    )
    assert [(g.start, g.stop) for g in groups] == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15)]
    assert [d for group in groups for d in trusted(source.read(group))] == whole


def test_an_id_that_is_not_utf8_is_a_bad_record(tmp_path: Path) -> None:
    import pyarrow as pa

    keys = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    write_parquet(tmp_path / "a.parquet", {"id": keys, "text": ["one", "two", "three"]})
    source = build(kind="parquet", path=str(tmp_path))
    (piece,) = source.pieces()
    first, second, third = source.read(piece)
    assert [d.id for d in (first, third) if isinstance(d, Document)] == ["a", "c"]
    assert isinstance(second, BadRecord)
    assert second.reason == "not_utf8"
    assert "row 1: column 'id' is not UTF-8 text" in str(second)


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(BadFile, match="has 2 columns that are called 'text'"):
        read_all(kind="parquet", path=str(tmp_path))


def test_text_is_no_id() -> None:
    with pytest.raises(ValueError, match="text_column and id_column are both 'body'"):
        SourceConfig(kind="jsonl", path="a.jsonl", text_column="body", id_column="body")


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path / "a") + b"\xff.txt")).write_text("text")
    with pytest.raises(DataError, match=r"the file name b'.*a\\xff\.txt' is not UTF-8; rename it"):
        build(kind="text", path=str(tmp_path)).pieces()


def test_each_line_of_a_text_file_can_be_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n  \ntwo \nthree".encode())
    documents = read_all(kind="text", path=str(tmp_path), document="line")
    assert [d.text for d in documents] == ["one", "two ", "three"]
    assert len({d.id for d in documents}) == 3


@pytest.mark.parametrize("fields", [{"document": "line"}, {"document_bytes": 50}])
def test_the_ranges_of_a_text_file_hold_all_of_it(tmp_path: Path, fields: dict[str, Any]) -> None:
    text = "".join(f"line {i}\n" + ("\n" if i % 5 == 0 else "") for i in range(1000))
    path = tmp_path / "a.txt"
    path.write_text(text)
    border = b"\n" if "document" in fields else b"\n\n"
    (file,) = plain_text.find_all((str(path),), (".txt",), "data.source.path")
    pieces = plain_text.file_pieces([file], 1000, border=border)
    assert len(pieces) > 5
    source = build(kind="text", path=str(path), **fields)
    documents = [d for piece in pieces for d in trusted(source.read(piece))]
    expected = [line for line in text.splitlines() if line]
    if "document" in fields:
        assert [d.text for d in documents] == expected
    else:
        assert "".join(d.text for d in documents) == text
        assert all(d.text.endswith("\n\n") for d in documents[:-1])
    assert len({d.id for d in documents}) == len(documents)


def test_synthetic_documents_are_a_function_of_the_seed(tmp_path: Path) -> None:
    few = {"num_documents": 400, "mean_words": 50, "vocabulary_words": 200}
    first = read_all(kind="synthetic", synthetic=few)
    assert first == read_all(kind="synthetic", synthetic=few)
    assert first != read_all(kind="synthetic", synthetic={**few, "seed": 1})
    longer = read_all(kind="synthetic", synthetic={**few, "num_documents": 500})
    assert longer[:400] == first
    assert len({d.id for d in longer}) == 500
    words = [word.strip(".").lower() for d in longer for word in d.text.split()]
    assert len(words) / 500 == pytest.approx(50, rel=0.15)  # 3 standard errors of the mean
    counts = [n for _, n in Counter(words).most_common()]
    assert len(counts) == 200
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.25)  # Zipf


def test_several_paths_are_read_in_order_and_keep_their_names_apart(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text(place)
    paths = (str(tmp_path / "two"), str(tmp_path / "one"))
    documents = read_all(kind="text", path=paths)
    assert [d.text for d in documents] == ["two", "one"]
    assert [d.source for d in documents] == ["0000/a.txt", "0001/a.txt"]
    with pytest.raises(MissingSource, match="does not exist"):
        build(kind="text", path=(str(tmp_path / "x"), str(tmp_path / "y"))).pieces()


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_location_that_is_missing_stays_missing_though_it_appears_later(
    tmp_path: Path, kind: str
) -> None:
    here, late = tmp_path / f"here.{kind}", tmp_path / f"late.{kind}"
    write_kind(here, kind)
    source = build(kind=kind, path=(str(here), str(late)))
    first, second = source.pieces()
    digest = source.contents()[1]
    write_kind(late, kind)
    assert [d.text for d in trusted(source.read(first))] == ["text"]
    with pytest.raises(BadFile, match=rf"late\.{kind} does not exist") as caught:
        list(source.read(second))
    assert caught.value.reason == "missing_file"
    assert digest == {"name": f"0001/{late}", "sha256": "missing"}


def test_a_file_that_goes_before_it_is_cut_is_a_piece_with_a_flaw(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("line\n" * 100)
    files = plain_text.find_all((str(tmp_path),), (".txt",), "data.source.path")
    (tmp_path / "a.txt").unlink()
    gone, *whole = plain_text.file_pieces(files, 100, border=b"\n")
    assert gone.flaw == ("missing_file", f"{tmp_path}/a.txt does not exist")
    assert {piece.path for piece in whole} == {f"{tmp_path}/b.txt"}
    source = build(kind="text", path=str(tmp_path), document="line")
    with pytest.raises(BadFile, match="does not exist"):
        list(source.read(gone))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_message_names_the_field_of_the_source_that_it_is_about(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"a.{kind}"
    write_kind(path, kind)
    place = {"kind": kind, "path": str(path), "text_column": "body"}
    source = build_sources(DataConfig.model_validate({"sources": {"web": place}}))["web"]
    with pytest.raises(DataError, match=r"set data\.sources\.web\.text_column"):
        [d for piece in source.pieces() for d in trusted(source.read(piece))]


def write_kind(path: Path, kind: str) -> None:
    if kind == "parquet":
        write_parquet(path, {"text": ["text"]})
    else:
        path.write_text({"text": "text", "jsonl": '{"text": "text"}\n'}[kind])


def test_an_empty_file_among_several_has_no_documents_and_the_digest_of_its_bytes(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "text"}\n')
    (tmp_path / "empty.jsonl").touch()
    paths = (str(tmp_path / "a.jsonl"), str(tmp_path / "empty.jsonl"))
    assert [d.text for d in read_all(kind="jsonl", path=paths)] == ["text"]
    digest = build(kind="jsonl", path=paths).contents()[1]
    assert digest == {"name": "0001/empty.jsonl", "sha256": hashlib.sha256().hexdigest()}
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        build(kind="jsonl", path=(paths[1], paths[1])).pieces()
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match="pictures holds no text"):
        build(kind="jsonl", path=(paths[0], str(tmp_path / "pictures"))).pieces()
