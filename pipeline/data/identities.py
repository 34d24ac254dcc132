"""From the ids that a source gave to those given twice, without holding the ids.

An id decides on which side of the split its document stands, and by it people find a document, so
one that stands twice in a source is bad input. Tasks note a hash of each given id; equal hashes are
looked for after the last task, in a number of passes that bounds the memory.
"""

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipeline.data.documents import Document
from pipeline.data.ledger import WORK_DIR
from pipeline.data.shards import commit_file
from pipeline.data.sources import Split
from pipeline.data.split_reader import RecordKey

IDENTITY_DIR = "ids"
IDENTITY = np.dtype([("high", "<u8"), ("low", "<u8"), ("piece", "<u4"), ("ordinal", "<u8")])
"""128 bits of the hash of source and id, and the document's place in its split."""
PASS_IDENTITIES = 1 << 24
"""Identities held at once, 28 bytes each and about as much again to sort them."""
HASH_BYTES = 16
KEY = struct.Struct("<IQ")
BUFFER_BYTES = 1 << 20


class IdentityWriter:
    """Notes the given ids of one split as its documents pass by; use it as a context manager."""

    def __init__(self, directory: Path, split: Split) -> None:
        """Take the prepared directory and the split."""
        self._path = _identity_path(directory, split.index)
        self._source = split.source
        self._buffer = bytearray()

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self._path.name}."
        # The file is renamed or removed when the block ends.
        self._stream = NamedTemporaryFile(dir=self._path.parent, prefix=prefix, delete=False)  # noqa: SIM115
        return self

    def noting(
        self, documents: Iterable[tuple[RecordKey, Document]]
    ) -> Iterator[tuple[RecordKey, Document]]:
        """Yield the documents as they are, noting the ids that the source gave."""
        for key, document in documents:
            if document.has_given_id:
                identity = f"{self._source}\n{document.id}".encode()
                self._buffer += hashlib.sha256(identity).digest()[:HASH_BYTES] + KEY.pack(*key)
                if len(self._buffer) >= BUFFER_BYTES:
                    self._flush()
            yield key, document
            del document  # no name may hold a long text while the next one is read

    def commit(self) -> None:
        """Give the file its name, with all that was noted."""
        self._flush()
        self._stream.flush()
        commit_file(self._stream.fileno(), Path(self._stream.name), self._path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        Path(self._stream.name).unlink(missing_ok=True)

    def _flush(self) -> None:
        self._stream.write(self._buffer)
        self._buffer.clear()


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
