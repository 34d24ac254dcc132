"""Prepared directories: reading across shards, manifests, damage."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.shard_writer import write_shard
from pipeline.data.shards import (
    ShardManifest,
    ShardSet,
    describe_prepared,
    load_manifest,
    load_token_bytes,
    write_manifest,
)
from pipeline.data.verification import verify_shards
from pipeline.errors import DataError

Make = Callable[..., ShardManifest]


def test_tokens_run_through_all_shards(make_prepared: Make) -> None:
    shards = ShardSet(make_prepared([[[1, 2], [3]], [[4]], [[5, 6, 7]]]), "train")
    assert shards.num_tokens == 7
    for start in range(8):
        for stop in range(start, 8):
            expected = [1, 2, 3, 4, 5, 6, 7][start:stop]
            assert shards.tokens(start, stop).tolist() == expected


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (3, 2)])
def test_a_range_outside_the_split_is_refused(make_prepared: Make, start: int, stop: int) -> None:
    shards = ShardSet(make_prepared([[[1, 2, 3]]]), "train")
    with pytest.raises(IndexError):
        shards.tokens(start, stop)


def test_a_manifest_is_read_back_as_it_was_written_wherever_it_stands(
    make_prepared: Make, tmp_path: Path
) -> None:
    manifest = make_prepared([[[1]]], [[[2, 3]]])
    assert load_manifest(manifest.directory) == manifest
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    manifest.directory.rename(moved)
    assert load_manifest(moved).directory == moved
    assert ShardSet(load_manifest(moved), "validation").tokens(0, 2).tolist() == [2, 3]


def test_a_directory_without_manifest_names_the_prepare_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="python -m launch prepare RUN"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 1', "[]"])
def test_a_broken_manifest_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json is not a shard manifest"):
        load_manifest(tmp_path)


def test_whole_shards_verify(make_prepared: Make) -> None:
    verify_shards(make_prepared([[[1, 2]], [[3]]], [[[4]]]).directory)


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "train-00001.idx", "token_bytes.npy", "tokenizer.json"]
)
def test_verify_finds_one_flipped_bit_and_names_the_file(make_prepared: Make, name: str) -> None:
    path = make_prepared([[[1, 2]], [[3]]]).directory / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        verify_shards(path.parent)


def test_verify_lists_every_missing_file(make_prepared: Make) -> None:
    directory = make_prepared([[[1, 2]], [[3]]]).directory
    (directory / "train-00000.bin").unlink()
    (directory / "train-00001.idx").unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin is missing; train-00001\.idx is miss"):
        verify_shards(directory)


def test_a_shard_of_another_size_is_not_opened(make_prepared: Make) -> None:
    manifest = make_prepared([[[1, 2]]])
    (manifest.directory / "train-00000.bin").write_bytes(b"\x01\x00")
    with pytest.raises(DataError, match="2 bytes, the manifest says 2 tokens"):
        ShardSet(manifest, "train")


def test_token_bytes_come_as_int32(make_prepared: Make) -> None:
    token_bytes = load_token_bytes(make_prepared([[[1]]], vocab_size=12).directory)
    assert token_bytes.dtype == np.int32
    assert token_bytes.shape == (12,)


def test_an_abandoned_shard_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with write_shard(tmp_path, "train-00000", "uint16") as writer:
            writer.write(np.array([1, 2]))
            writer.add(np.array([2]), 2)
            raise RuntimeError("the task dies here")

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_description_counts_without_end_of_document_tokens(make_prepared: Make) -> None:
    described = describe_prepared(make_prepared([[[1, 0], [2, 3, 0]]], [[[5, 6, 0]]]).directory)
    assert described["tokens"] == {"train": 5, "validation": 3}
    assert described["documents"] == {"train": 2, "validation": 1}
    assert described["bytes_per_token"] == {"train": 5 / 3, "validation": 3 / 2}
    assert described["shards"] == ["train-00000", "validation-00000"]


def test_a_description_names_the_sources_and_their_kinds(make_prepared: Make) -> None:
    sources = {"web": {"kind": "jsonl", "text_column": "text"}, "code": {"kind": "parquet"}}
    manifest = make_prepared([[[1, 0]]], [[[5, 6, 0]]])
    write_manifest(manifest.model_copy(update={"recipe": {"sources": sources}}))
    described = describe_prepared(manifest.directory)
    assert described["source_kinds"] == {"web": "jsonl", "code": "parquet"}
