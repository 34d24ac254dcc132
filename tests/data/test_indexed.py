"""The shard files against hand-written bytes and a reader that shares no code with the writer."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.indexed import encode_index, read_index, token_dtype
from pipeline.data.shards import ShardManifest
from pipeline.errors import DataError

THREE_AND_ONE = (
    b"MMIDIDX\x00\x00"
    b"\x01\x00\x00\x00\x00\x00\x00\x00"  # version 1
    b"\x08"  # uint16
    b"\x02\x00\x00\x00\x00\x00\x00\x00"  # 2 sequences
    b"\x03\x00\x00\x00\x00\x00\x00\x00"  # 2 documents + 1
    b"\x03\x00\x00\x00\x01\x00\x00\x00"  # lengths 3, 1
    b"\x00\x00\x00\x00\x00\x00\x00\x00"  # starts at byte 0
    b"\x06\x00\x00\x00\x00\x00\x00\x00"  # starts at byte 6
    b"\x00\x00\x00\x00\x00\x00\x00\x00"  # document 0 begins at sequence 0
    b"\x01\x00\x00\x00\x00\x00\x00\x00"
    b"\x02\x00\x00\x00\x00\x00\x00\x00"  # the last one ends at sequence 2
)


def read_independently(prefix: Path) -> list[list[int]]:
    """Read a Megatron indexed dataset with `struct` alone: a list of documents."""
    index = prefix.with_suffix(".idx").read_bytes()
    tokens = prefix.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, starts = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    letter, width = {8: ("H", 2), 4: ("i", 4)}[code]
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    documents = struct.unpack_from(f"<{starts}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * starts
    assert documents[0] == 0
    assert documents[-1] == sequences
    assert len(tokens) == sum(lengths) * width
    return [
        list(struct.unpack_from(f"<{length}{letter}", tokens, pointer))
        for length, pointer in zip(lengths, pointers, strict=True)
    ]


def test_index_bytes_are_those_of_megatron() -> None:
    assert encode_index(np.array([3, 1], dtype=np.int32), "uint16") == THREE_AND_ONE


def test_bin_holds_little_endian_tokens_and_nothing_else(
    make_prepared: Callable[..., ShardManifest],
) -> None:
    directory = make_prepared([[[1, 2, 515], [4]]]).directory
    assert (directory / "train-00000.bin").read_bytes() == b"\x01\x00\x02\x00\x03\x02\x04\x00"
    assert (directory / "train-00000.idx").read_bytes() == THREE_AND_ONE


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_an_independent_reader_gets_every_document_back(
    make_prepared: Callable[..., ShardManifest], dtype: str
) -> None:
    documents = [[7, 8, 9, 0], [65_499, 0], [0]]
    manifest = make_prepared([documents], vocab_size=65_500, dtype=dtype)
    assert read_independently(manifest.directory / "train-00000") == documents


def test_dtype_changes_where_megatron_changes_it() -> None:
    assert token_dtype(65_499) == "uint16"
    assert token_dtype(65_500) == "int32"


@pytest.mark.parametrize(
    "data",
    [
        b"not an index at all, though it is longer than the header is",
        THREE_AND_ONE[:-8],
        THREE_AND_ONE[:17] + b"\x07" + THREE_AND_ONE[18:],
        THREE_AND_ONE[:-8] + b"\x05\x00\x00\x00\x00\x00\x00\x00",
    ],
    ids=["magic", "cut", "dtype", "documents"],
)
def test_a_damaged_index_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "train-00000.idx"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00000\.idx"):
        read_index(path)


def test_reading_an_index_gives_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.idx"
    path.write_bytes(THREE_AND_ONE)
    index = read_index(path)
    assert index.dtype == "uint16"
    assert index.lengths_tokens.tolist() == [3, 1]
    assert index.starts_bytes.tolist() == [0, 6]
    assert index.document_starts.tolist() == [0, 1, 2]
    assert index.num_tokens == 4
