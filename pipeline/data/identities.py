"""From the ids that a source gave to those given twice, without holding the ids.

An id decides on which side of the split its document stands, and by it people find a document, so
one that stands twice in a source is bad input. Tasks note a hash of each given id; equal hashes are
looked for after the last task, in a number of passes that bounds the memory.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.documents import Document
from pipeline.data.ledger import WORK_DIR
from pipeline.data.shards import write_atomic
from pipeline.data.sources import Split
from pipeline.data.split_reader import RecordKey

IDENTITY_DIR = "ids"
IDENTITY = np.dtype([("high", "<u8"), ("low", "<u8"), ("piece", "<u4"), ("ordinal", "<u8")])
"""128 bits of the hash of source and id, and the document's place in its split."""
PASS_IDENTITIES = 1 << 24
"""Identities held at once, 28 bytes each and about as much again to sort them."""
HASH_BYTES = 16


class IdentityWriter:
    """Notes the given ids of one split as its documents pass by."""

    def __init__(self, directory: Path, split: Split) -> None:
        """Take the prepared directory and the split."""
        self._path = _identity_path(directory, split.index)
        self._source = split.source
        self._rows: list[tuple[bytes, int, int]] = []

    def noting(self, documents: Iterable[tuple[RecordKey, Document]]) -> Iterator[Document]:
        """Yield the documents, noting the ids that the source gave."""
        for (piece, ordinal), document in documents:
            if document.has_given_id:
                key = f"{self._source}\n{document.id}".encode()
                digest = hashlib.sha256(key).digest()[:HASH_BYTES]
                self._rows.append((digest, piece, ordinal))
            yield document
            del document  # no name may hold a long text while the next one is read

    def commit(self) -> None:
        """Write what was noted."""
        array = np.zeros(len(self._rows), dtype=IDENTITY)
        if self._rows:
            digests, pieces, ordinals = zip(*self._rows, strict=True)
            words = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
            array["high"], array["low"] = words[:, 0], words[:, 1]
            array["piece"], array["ordinal"] = pieces, ordinals
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, array.tobytes())


def find_repeated(directory: Path, splits: list[Split]) -> dict[int, dict[RecordKey, str]]:
    """Find the documents whose id an earlier document of the same source has.

    Args:
        directory: The prepared directory, in which every split has noted its ids.
        splits: All splits.

    Returns:
        By split, the place of each later document and the reason `duplicate_id`.
    """
    repeated: dict[int, dict[RecordKey, str]] = defaultdict(dict)
    sizes = [_identity_path(directory, s.index).stat().st_size for s in splits]
    num_passes = max(1, -(-sum(sizes) // IDENTITY.itemsize // PASS_IDENTITIES))
    for number in range(num_passes):
        rows, owners = _read_pass(directory, splits, number, num_passes)
        order = np.lexsort((rows["ordinal"], rows["piece"], owners, rows["low"], rows["high"]))
        rows, owners = rows[order], owners[order]
        is_later = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
        for i in np.flatnonzero(is_later) + 1:
            place = int(rows["piece"][i]), int(rows["ordinal"][i])
            repeated[int(owners[i])][place] = "duplicate_id"
    return dict(repeated)


def _read_pass(
    directory: Path, splits: list[Split], number: int, num_passes: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    parts, owners = [np.zeros(0, dtype=IDENTITY)], [np.zeros(0, dtype=np.int64)]
    for split in splits:
        part = np.fromfile(_identity_path(directory, split.index), dtype=IDENTITY)
        part = part[part["low"] % np.uint64(num_passes) == number]
        parts.append(part)
        owners.append(np.full(len(part), split.index, dtype=np.int64))
    return np.concatenate(parts), np.concatenate(owners)


def _identity_path(directory: Path, index: int) -> Path:
    return directory / WORK_DIR / IDENTITY_DIR / f"split-{index:05d}.bin"
