"""The Hugging Face source on local datasets; the network is never asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import SourceConfig
from pipeline.data.documents import Document, trusted
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
    with pytest.raises(DataError, match=r"of dataset .*scripted: .*scripts"):
        read_all(directory)
