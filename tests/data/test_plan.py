"""The fingerprint changes with everything that decides a token id, and with nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import DataConfig
from pipeline.data.plan import fingerprint, plan_recipe
from pipeline.data.sources import build_sources

Make = Callable[..., DataConfig]


def print_of(config: DataConfig) -> str:
    return fingerprint(plan_recipe(config, build_sources(config)))


@pytest.fixture
def corpus(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl(tmp_path / "c.jsonl", [{"text": "a"}])


@pytest.mark.parametrize(
    "fields",
    [
        {"validation_fraction": 0.3},
        {"tokenizer": {"vocab_size": 301}},
        {"tokenizer": {"end_of_document": "<eod>"}},
        {"source": {"text_column": "body"}},
        {"source": {"id_column": "key"}},
        {"source": {"kind": "text"}},
        {"max_document_bytes": 1000},
        {"tokenizer": {"special_tokens_in_text": True}},
        {"clean": {"deduplicate": "exact"}},
        {"clean": {"deduplicate": "minhash"}},
        {"clean": {"keep_dropped": True}},
    ],
)
def test_it_follows_every_option(
    corpus: Path, tmp_path: Path, make_config: Make, fields: dict[str, Any]
) -> None:
    assert print_of(make_config(corpus, tmp_path, **fields)) != print_of(
        make_config(corpus, tmp_path)
    )


def test_it_follows_contents_and_file_names_not_places(
    corpus: Path, tmp_path: Path, make_config: Make, write_jsonl: Callable[..., Path]
) -> None:
    before = print_of(make_config(corpus, tmp_path))
    moved = write_jsonl(tmp_path / "elsewhere" / "c.jsonl", [{"text": "a"}])
    assert print_of(make_config(moved, tmp_path / "out")) == before
    renamed = write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}])
    assert print_of(make_config(renamed, tmp_path)) != before
    write_jsonl(corpus, [{"text": "b"}])
    assert print_of(make_config(corpus, tmp_path)) != before


def test_it_follows_the_contents_of_a_tokenizer_file(
    corpus: Path, tmp_path: Path, make_config: Make
) -> None:
    path = tmp_path / "tokenizer.json"
    config = make_config(corpus, tmp_path, tokenizer={"path": str(path)})
    path.write_text("{}")
    before = print_of(config)
    copied = tmp_path / "copy.json"
    copied.write_text("{}")
    assert print_of(make_config(corpus, tmp_path, tokenizer={"path": str(copied)})) == before
    path.write_text("{ }")
    assert print_of(config) != before


def test_options_that_a_kind_does_not_read_do_not_count(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "c.txt").write_text("a")
    one = make_config(tmp_path, tmp_path, source={"kind": "text"})
    other = make_config(tmp_path, tmp_path, source={"kind": "text", "text_column": "body"})
    assert print_of(one) == print_of(other)
