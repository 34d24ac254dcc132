"""Tokens and document lengths to and from Megatron's indexed dataset, `NAME.bin` and `NAME.idx`.

`.bin` holds token ids back to back, little-endian, nothing else. `.idx`, all little-endian::

    9 bytes  magic              8  version = 1         1  dtype code
    8        N sequences        8  M = documents + 1
    4N       int32 sequence lengths in tokens
    8N       int64 sequence starts in bytes of .bin
    8M       int64 document starts in sequences, the last one = N

Here a document is one sequence, so M = N + 1.

Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py, commit d98e8a6.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES = {"int32": 4, "uint16": 8}
HEADER = struct.Struct("<9sQBQQ")
LARGEST_SHORT_VOCABULARY = 65_500
"""Megatron stores ids as uint16 below this many entries, as int32 from there on."""


@dataclass(frozen=True, kw_only=True)
class DocumentIndex:
    """The contents of one `.idx` file."""

    dtype: str
    lengths_tokens: npt.NDArray[np.int32]
    starts_bytes: npt.NDArray[np.int64]
    document_starts: npt.NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths_tokens.sum(dtype=np.int64))


def token_dtype(vocab_size: int) -> str:
    """Give the name of the dtype that holds token ids of a vocabulary."""
    return "uint16" if vocab_size < LARGEST_SHORT_VOCABULARY else "int32"


def little_endian(dtype: str) -> np.dtype[np.uint16] | np.dtype[np.int32]:
    """Give the on-disk form of a token dtype."""
    return np.dtype("<u2") if dtype == "uint16" else np.dtype("<i4")


def encode_index(lengths_tokens: npt.NDArray[np.int32], dtype: str) -> bytes:
    """Give the bytes of the `.idx` file of documents with these lengths."""
    num_documents = len(lengths_tokens)
    itemsize = little_endian(dtype).itemsize
    starts = np.zeros(num_documents, dtype="<i8")
    np.cumsum(lengths_tokens[:-1].astype(np.int64) * itemsize, out=starts[1:])
    header = HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], num_documents, num_documents + 1)
    lengths = lengths_tokens.astype("<i4").tobytes()
    documents = np.arange(num_documents + 1, dtype="<i8").tobytes()
    return header + lengths + starts.tobytes() + documents


def read_index(path: Path) -> DocumentIndex:
    """Read an `.idx` file and check it against itself.

    Raises:
        DataError: The file is missing, is no index, or its parts contradict each other.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise DataError(f"cannot read shard index {path}: {exc.strerror}") from exc
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise DataError(f"{path} is not a Megatron shard index")
    _, version, code, num_sequences, num_starts = HEADER.unpack_from(data)
    names = {number: name for name, number in DTYPE_CODES.items()}
    if version != VERSION or code not in names:
        raise DataError(f"{path} has version {version} and dtype code {code}; known: 1 and 4, 8")
    if len(data) != HEADER.size + 12 * num_sequences + 8 * num_starts:
        raise DataError(
            f"{path} has {len(data)} bytes, not what its {num_sequences} documents take"
        )
    offset = HEADER.size
    lengths = np.frombuffer(data, "<i4", num_sequences, offset)
    starts = np.frombuffer(data, "<i8", num_sequences, offset + 4 * num_sequences)
    documents = np.frombuffer(data, "<i8", num_starts, offset + 12 * num_sequences)
    if num_starts == 0 or documents[-1] != num_sequences:
        raise DataError(f"{path}: the document starts do not end at {num_sequences} sequences")
    return DocumentIndex(
        dtype=names[code], lengths_tokens=lengths, starts_bytes=starts, document_starts=documents
    )
