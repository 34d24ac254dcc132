"""The Hugging Face source on local datasets; the network is never asked."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import SourceConfig
from pipeline.data.documents import BadFile, Document, trusted
from pipeline.data.sources import Source, build_source
from pipeline.errors import DataError

pytestmark = pytest.mark.slow

ROWS = {"id": ["a", "b", "c"], "text": ["one", "", "drei \u00df"], "n": [1, 2, 3]}


def read_all(path: Path | str, **config: Any) -> list[Document]:
    source = build(path, **config)
    return [d for piece in source.pieces() for d in trusted(source.read(piece))]


def build(path: Path | str, **config: Any) -> Source:
    config = {"kind": "huggingface", "path": str(path), **config}
    return build_source(SourceConfig(**config), max_document_bytes=1 << 20)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as a dataset, as a dict of splits, and as data files."""
    import datasets

    root = tmp_path_factory.mktemp("datasets")
    dataset = datasets.Dataset.from_dict(ROWS)
    datasets.disable_progress_bars()
    dataset.save_to_disk(root / "plain")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(
        root / "dict"
    )
    (root / "files").mkdir()
    dataset.to_parquet(root / "files" / "train.parquet")
    return root


@pytest.mark.parametrize("form", ["plain", "dict", "files"])
def test_each_local_form_gives_the_same_documents(saved: Path, form: str) -> None:
    documents = read_all(saved / form)
    assert [(d.id, d.text) for d in documents] == [("a", "one"), ("b", ""), ("c", "drei \u00df")]


def test_a_named_split_is_taken_and_an_unknown_one_is_an_error(saved: Path) -> None:
    assert [d.id for d in read_all(saved / "dict", split="test")] == ["c"]
    with pytest.raises(DataError, match=r"no split 'dev'.*\['train', 'test'\]"):
        read_all(saved / "dict", split="dev")
    with pytest.raises(DataError, match="cannot load split 'dev'"):
        read_all(saved / "files", split="dev")


def test_an_unknown_text_column_lists_the_columns(saved: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'body'.*\['id', 'text', 'n'\]"):
        read_all(saved / "plain", text_column="body")


def test_a_column_that_holds_no_text_names_the_row(saved: Path) -> None:
    with pytest.raises(DataError, match="row 0: column 'n' holds a int, not text"):
        read_all(saved / "plain", text_column="n")


def test_contents_follow_the_files_of_a_local_dataset(
    saved: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    plain = build(saved / "plain").contents()
    assert {"state.json", "dataset_info.json"} < {entry["name"] for entry in plain}
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    source = build(tmp_path)
    before = source.contents()
    assert [d.text for d in read_all(tmp_path)] == ["a"]
    write_jsonl(tmp_path / "train.jsonl", [{"text": "b"}])
    assert source.contents() != before


def test_a_dataset_that_is_not_there_is_an_error_without_a_network() -> None:
    with pytest.raises(DataError, match="cannot load split 'train' of dataset nobody/nothing"):
        read_all("nobody/nothing")


def test_a_dataset_that_comes_as_a_script_is_an_error_of_ours(tmp_path: Path) -> None:
    directory = tmp_path / "scripted"
    directory.mkdir()
    (directory / "scripted.py").write_text("raise SystemExit('this was run')\n")
    with pytest.raises(DataError, match=r"of dataset .*scripted .*scripts"):
        read_all(directory)


def test_a_damaged_shard_is_a_bad_file_and_leaves_the_others_readable(
    tmp_path: Path,
) -> None:
    for number in range(2):
        packed = gzip.compress(b"text\n" + b"shard %d\n" % number * 9)
        (tmp_path / f"train-{number}.csv.gz").write_bytes(packed[:-9] if number == 0 else packed)
    source = build(tmp_path)
    damaged, whole = source.pieces()
    assert {d.text for d in trusted(source.read(whole))} == {"shard 1"}
    with pytest.raises(BadFile, match=r"shard 0, row unknown") as caught:
        list(source.read(damaged))
    assert caught.value.reason == "damaged_file"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives EIO")
def test_a_disk_that_cannot_be_read_is_no_bad_file(tmp_path: Path) -> None:
    # Its first page is never mapped, so a read at its start fails with EIO.
    (tmp_path / "train.csv").symlink_to("/proc/self/mem")
    source = build(tmp_path)
    (piece,) = source.pieces()
    with pytest.raises(DataError, match="shard 0, row unknown: .*Input/output error") as caught:
        list(source.read(piece))
    assert not isinstance(caught.value, BadFile)


def test_a_first_file_that_is_damaged_from_its_start_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n')[:-9])
    with pytest.raises(DataError, match="cannot load split 'train' of dataset .*: Compressed file"):
        build(tmp_path).pieces()
