"""The fingerprint changes with everything that decides a token id, and with nothing else."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import CleanConfig, DataConfig
from pipeline.data.plan import fingerprint, plan_recipe
from pipeline.data.prepare import prepare
from pipeline.data.shards import ShardManifest, write_manifest
from pipeline.data.sources import build_sources
from pipeline.errors import ConfigError, DataError

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


def test_shards_are_used_wherever_they_are_whatever_would_clean_there(
    corpus: Path,
    tmp_path: Path,
    make_config: Make,
    make_prepared: Callable[..., ShardManifest],
    run_without_clean: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    clean = {"filters": ["gopher_quality"], "deduplicate": "minhash"}
    config = make_config(corpus, tmp_path / "out", clean=clean)
    older = {"datatrove": "0.0.1", "spacy": "0.0.1", "rensa": "0.0.1"}
    recipe = plan_recipe(config, build_sources(config), older)
    made = make_prepared([[[1] * 9]], [[[1] * 9]]).model_copy(update={"recipe": recipe})
    write_manifest(made)
    there = config.model_copy(update={"prepared_dir": made.directory})
    assert prepare(there).recipe["clean"]["versions"] == older
    moved = there.model_copy(update={"source": there.source.model_copy(update={"path": "/gone"})})
    assert prepare(moved).recipe == recipe
    with pytest.raises(DataError, match="was not made from this config \\(clean: "):
        prepare(there.model_copy(update={"clean": CleanConfig(filters=("gopher_quality",))}))

    # What stands under its fingerprint is found by the versions, so that they must be there.
    result = run_without_clean(
        "from pipeline.config.data import DataConfig\n"
        "from pipeline.data.prepare import prepare\n"
        "from pipeline.errors import ConfigError\n"
        f"print(prepare(DataConfig.model_validate_json({there.model_dump_json()!r})).fingerprint)\n"
        f"try: prepare(DataConfig.model_validate_json({config.model_dump_json()!r}))\n"
        "except ConfigError as exc: print(exc)\n"
    )
    assert result.stdout.splitlines() == [
        made.fingerprint,
        "data.clean.deduplicate=minhash needs the package rensa, which is missing: "
        "pip install 'tandem-pretraining[clean]'",
    ], result.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_filter_has_no_fingerprint(
    corpus: Path, tmp_path: Path, make_config: Make
) -> None:
    with pytest.raises(ConfigError, match="names 'gofer'; nearest: gopher"):
        print_of(make_config(corpus, tmp_path, clean={"filters": ["gofer"]}))


def test_options_that_a_kind_does_not_read_do_not_count(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "c.txt").write_text("a")
    one = make_config(tmp_path, tmp_path, source={"kind": "text"})
    other = make_config(tmp_path, tmp_path, source={"kind": "text", "text_column": "body"})
    assert print_of(one) == print_of(other)
