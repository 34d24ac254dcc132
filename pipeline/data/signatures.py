"""From the documents of a split to a file of signatures, and from signature files to duplicates.

Two documents have the same text if their UTF-8 bytes are equal; it is compared by 128 bits of
SHA-256. Nearly the same is judged by MinHash over shingles of words, and for it case, punctuation
and whitespace count for nothing: a word is a run of letters, digits and underscores after lower
case and NFC. Numbers count. A script without spaces has words as long as its clauses.

A signature file is a matrix of unsigned 64-bit integers, a column a document and a row a field, so
that one band of many files is read without the others: piece and ordinal, two halves of the text's
digest, then, for MinHash, one hash a band. That is 32 bytes a document, 144 with 14 bands.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.config.data import CleanConfig, MinHashConfig
from pipeline.data.assembly import npy_bytes
from pipeline.data.shards import write_atomic
from pipeline.data.split_reader import RecordKey

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

KEY_ROWS = slice(0, 2)
TEXT_ROWS = slice(2, 4)
FIRST_BAND_ROW = 4

BATCH_BYTES = 4 << 20
"""Hashes of shingles, 8 bytes a word, that are signed at once."""
BATCH_DOCUMENTS = 4096
"""Documents that are signed at once: their hashes are Python numbers for a moment."""
CHUNK_BYTES = 1 << 20
"""Of a text whose words are Python objects at once; a word takes ten times its bytes."""

NO_WORD = re.compile(r"\W+")
WORD_BYTES = b"abcdefghijklmnopqrstuvwxyz0123456789_"
ASCII_TO_WORDS = bytes(b if b in WORD_BYTES else ord(" ") for b in range(256))

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio, odd."""
MIXERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", the finalizer
(variant 13 of Stafford)."""


def write_signatures(
    documents: Iterable[tuple[RecordKey, str]], config: CleanConfig, path: Path
) -> int:
    """Write the signatures of documents, all or nothing, and give their number.

    Args:
        documents: Key and text of each, in the order of the source; one text is held at a time.
        config: What is compared.
        path: The file.
    """
    keys: list[RecordKey] = []
    digests: list[bytes] = []
    signer = _BandSigner(config.minhash) if config.deduplicate == "minhash" else None
    for key, text in documents:
        keys.append(key)
        digests.append(hashlib.sha256(text.encode()).digest()[:16])
        if signer is not None:
            signer.add(text)
    key_rows = np.array(keys, dtype=np.uint64).reshape(-1, 2).T
    text_rows = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2).T
    band_rows = [signer.finish(text_rows[0])] if signer is not None else []
    rows = np.concatenate([key_rows, text_rows, *band_rows])
    write_atomic(path, npy_bytes(np.ascontiguousarray(rows)))
    return len(keys)


def read_rows(paths: Sequence[Path], rows: slice) -> UInt64Array:
    """Read some rows of several files, documents back to back."""
    parts = [np.array(np.load(path, mmap_mode="r")[rows]) for path in paths]
    return np.concatenate(parts, axis=1)


def count_documents(path: Path) -> int:
    """Give the number of documents of a file."""
    return int(np.load(path, mmap_mode="r").shape[1])


def find_equal(paths: Sequence[Path], rows: slice) -> Int64Array:
    """Pair every document with the first that agrees with it in these rows.

    It takes some 40 bytes a document, 60 for the two rows of the text.

    Returns:
        [pairs, 2] numbers of documents over all files in order, the first before the other.
    """
    columns = read_rows(paths, rows)
    order = np.lexsort(columns)  # stable: of equal columns the first document comes first
    columns = columns[:, order]
    is_repeat = np.zeros(len(order), dtype=bool)
    is_repeat[1:] = (columns[:, 1:] == columns[:, :-1]).all(axis=0)
    del columns
    starts = np.maximum.accumulate(np.where(is_repeat, 0, np.arange(len(order))))
    return np.stack([order[starts[is_repeat]], order[is_repeat]], axis=1).astype(np.int64)


def join_pairs(pairs: Int64Array) -> Int64Array:
    """Pair every document of a connected group with the first of the group.

    Args:
        pairs: [pairs, 2] numbers of documents that are duplicates, in any order.

    Returns:
        [documents, 2] first of the group and other, sorted by the other.
    """
    if not len(pairs):
        return np.empty((0, 2), dtype=np.int64)
    members, places = np.unique(pairs, return_inverse=True)
    ends = places.reshape(-1, 2)
    graph = coo_array(
        (np.ones(len(ends), dtype=bool), (ends[:, 0], ends[:, 1])), (len(members),) * 2
    )
    _, groups = connected_components(graph, directed=False)
    _, firsts = np.unique(groups, return_index=True)  # members are sorted: this is the first one
    joined: Int64Array = np.stack([members[firsts[groups]], members], axis=1)
    is_other: npt.NDArray[np.bool_] = joined[:, 0] != joined[:, 1]
    return joined[is_other]


def shingle_hashes(text: str, shingle_words: int) -> UInt64Array:
    """Hash the shingles of a text; one with fewer words has none."""
    words = _word_hashes(_fold(text))
    num_shingles = max(len(words) - shingle_words + 1, 0)
    hashes = np.zeros(num_shingles, dtype=np.uint64)
    for i in range(shingle_words):
        hashes *= MULTIPLIER
        hashes += words[i : i + num_shingles]
    return _mix(hashes)


def band_hashes(shingles: Sequence[UInt64Array], config: MinHashConfig) -> UInt64Array:
    """Give [bands, documents] hashes of bands; two documents agree in one if all of its hashes do.

    Args:
        shingles: Hashes of each document's shingles.
        config: Bands, and hashes of each.
    """
    import rensa

    offsets = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    num_hashes = config.num_bands * config.band_hashes
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), offsets, num_hashes, config.seed
    )
    digests = np.array(matrix.to_rows(), dtype=np.uint64)
    digests = digests.reshape(len(shingles), config.num_bands, config.band_hashes)
    hashes = np.zeros((len(shingles), config.num_bands), dtype=np.uint64)
    for i in range(config.band_hashes):
        hashes = _mix(hashes * MULTIPLIER + digests[:, :, i])
    return np.ascontiguousarray(hashes.T)


class _BandSigner:
    """Gathers the band hashes of documents in batches."""

    def __init__(self, config: MinHashConfig) -> None:
        self._config = config
        self._batch: list[UInt64Array] = []
        self._batch_bytes = 0
        self._bands = [np.empty((config.num_bands, 0), dtype=np.uint64)]
        self._has_shingles: list[bool] = []

    def add(self, text: str) -> None:
        hashes = shingle_hashes(text, self._config.shingle_words)
        self._batch.append(hashes)
        self._batch_bytes += hashes.nbytes
        self._has_shingles.append(len(hashes) > 0)
        if self._batch_bytes > BATCH_BYTES or len(self._batch) == BATCH_DOCUMENTS:
            self._sign()

    def finish(self, digests: UInt64Array) -> UInt64Array:
        """Give [bands, documents]; one without shingles agrees with those of its digest alone."""
        self._sign()
        has_shingles = np.array(self._has_shingles, dtype=bool)
        return np.where(has_shingles, np.concatenate(self._bands, axis=1), digests)

    def _sign(self) -> None:
        if self._batch:
            self._bands.append(band_hashes(self._batch, self._config))
        self._batch, self._batch_bytes = [], 0


def _word_hashes(folded: bytes) -> UInt64Array:
    import rensa

    parts = []
    start = 0
    while start < len(folded):
        stop = folded.find(b" ", start + CHUNK_BYTES)
        stop = len(folded) if stop < 0 else stop
        (hashes,) = rensa.RMinHash.hash_token_sets([folded[start:stop].split()])
        parts.append(np.array(hashes, dtype=np.uint64))
        start = stop
    return np.concatenate([np.empty(0, dtype=np.uint64), *parts])


def _fold(text: str) -> bytes:
    """Give the words of a text as UTF-8, with spaces between them."""
    text = text.lower()
    if text.isascii():
        return text.encode().translate(ASCII_TO_WORDS)
    return NO_WORD.sub(" ", unicodedata.normalize("NFC", text)).encode()


def _mix(hashes: UInt64Array) -> UInt64Array:
    for shift, multiplier in zip((30, 27), MIXERS, strict=True):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * multiplier
    return hashes ^ (hashes >> np.uint64(31))
