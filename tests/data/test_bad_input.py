"""Input that cannot be used: our error, before Ray starts where it can be known, no directory."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pipeline
from pipeline.config.data import DataConfig
from pipeline.data.make_shards import hash_fraction
from pipeline.data.prepare import prepare
from pipeline.errors import ConfigError, DataError

Make = Callable[..., DataConfig]


def check_refused(config: DataConfig, match: str) -> None:
    events: list[str] = []
    with pytest.raises(DataError, match=match):
        prepare(config, lambda event: events.append(event.message))
    assert config.output_dir is not None
    left = [p for p in config.output_dir.glob("*") if not p.name.startswith(".")]
    assert left == []
    assert not any(event.startswith("starting Ray") for event in events)


@pytest.fixture
def good(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl(tmp_path / "text" / "c.jsonl", [{"id": f"{i}", "text": "x"} for i in "abc"])


def test_missing_and_empty_sources(tmp_path: Path, make_config: Make) -> None:
    out = tmp_path / "out"
    check_refused(make_config(tmp_path / "nowhere.jsonl", out), "does not exist")
    (tmp_path / "empty.jsonl").touch()
    check_refused(make_config(tmp_path / "empty.jsonl", out), "is empty")
    (tmp_path / "pictures").mkdir()
    check_refused(make_config(tmp_path / "pictures", out), "holds no text")
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    check_refused(make_config(tmp_path / "pictures", out), "holds no text")


def test_lines_without_text_or_json(
    tmp_path: Path, make_config: Make, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"body": "y"}])
    check_refused(make_config(path, tmp_path / "out"), r"a\.jsonl:2: no field 'text'")
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}, "", "{broken"])
    check_refused(
        make_config(path, tmp_path / "out"), r"b\.jsonl:3: invalid JSON.*on_bad_input=quarantine"
    )


def test_a_truncated_archive(
    tmp_path: Path, make_config: Make, write_jsonl: Callable[..., Path]
) -> None:
    for suffix in (".zst", ".gz"):
        path = write_jsonl(tmp_path / f"a.jsonl{suffix}", [{"text": "x" * 99}] * 99)
        path.write_bytes(path.read_bytes()[:-5])
        check_refused(
            make_config(path, tmp_path / "out"), f"a.jsonl{suffix} is not a whole.*=quarantine"
        )


def test_tokenizers_that_cannot_be_used(tmp_path: Path, make_config: Make, good: Path) -> None:
    path = tmp_path / "t.json"
    check_refused(make_config(good, tmp_path / "out", tokenizer={"path": str(path)}), "cannot read")
    path.write_text("{}")
    check_refused(
        make_config(good, tmp_path / "out", tokenizer={"path": str(path)}), "is not a token"
    )


def test_a_place_that_cannot_be_written(tmp_path: Path, make_config: Make, good: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write to"):
        prepare(make_config(good, tmp_path / "file" / "out"))


def test_no_directory_at_all_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.output_dir"):
        prepare(DataConfig())


@pytest.mark.slow
def test_a_source_of_blank_documents(
    local_ray: None, tmp_path: Path, make_config: Make, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": " \n"}])
    with pytest.raises(DataError, match=r"no document with text in it; dropped: {'empty': 2}"):
        prepare(make_config(path, tmp_path / "out"))


@pytest.mark.slow
def test_an_empty_split_names_a_fraction_that_works(
    local_ray: None, tmp_path: Path, make_config: Make, good: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="the validation split is empty") as error:
        prepare(make_config(good, out, validation_fraction=0.001))
    nearest = float(str(error.value).rpartition("=")[2])
    assert nearest == pytest.approx(min(map(hash_fraction, "abc")), abs=2e-4)
    manifest = prepare(make_config(good, out, validation_fraction=nearest))
    assert manifest.splits["validation"].documents == 1
    with pytest.raises(DataError, match="the train split is empty"):
        prepare(make_config(good, out, validation_fraction=0.999))


@pytest.mark.slow
def test_one_document_cannot_be_split(local_ray: None, tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "book.txt").write_text("One paragraph.\n\n" * 2000)
    with pytest.raises(DataError, match=r"give at least two.*data\.source\.document_bytes=4096"):
        prepare(make_config(tmp_path / "book.txt", tmp_path / "out", source={"kind": "text"}))
    source = {"kind": "text", "document_bytes": 1024}
    config = make_config(tmp_path / "book.txt", tmp_path / "out", source=source)
    assert prepare(config).splits["train"].documents > 5


def test_importing_the_package_loads_neither_ray_nor_a_tokenizer() -> None:
    code = (
        "import sys, pipeline.data, pipeline.data.prepare, pipeline.data.loader\n"
        "print(sorted({'ray', 'tokenizers', 'fastokens', 'datasets', 'torch'} & set(sys.modules)))"
    )
    root = Path(pipeline.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
