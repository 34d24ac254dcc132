"""From encoded documents to one shard: its two files, named when whole, and its manifest row."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipeline.data.indexed import encode_index, little_endian
from pipeline.data.shards import ShardRecord, SourceRange, commit_file, write_atomic


class ShardWriter:
    """Writes one shard as documents arrive; its files take their names when it is whole."""

    def __init__(self, stream: IO[bytes], directory: Path, name: str, dtype: str) -> None:
        self.is_finished = False
        self._stream = stream
        self._directory = directory
        self._name = name
        self._dtype = dtype
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._digest = hashlib.sha256()
        self._text_bytes = 0
        self._largest_id = 0

    def write(self, tokens: npt.NDArray[Any]) -> None:
        """Append tokens, end-of-document tokens included; `add` says whose they are."""
        data = np.ascontiguousarray(tokens, dtype=little_endian(self._dtype)).data
        self._stream.write(data)
        self._digest.update(data)
        self._largest_id = max(self._largest_id, int(tokens.max()))

    def add(self, lengths_tokens: npt.NDArray[Any], text_bytes: int) -> None:
        """Count documents whose tokens have been written.

        Args:
            lengths_tokens: Tokens of each, the one that closes it included.
            text_bytes: Their UTF-8 bytes.
        """
        if len(lengths_tokens):
            self._lengths.append(lengths_tokens.astype(np.int32))
            self._text_bytes += text_bytes

    def finish(self, source: str, encoder: str, ranges: list[SourceRange]) -> ShardRecord | None:
        """Write the index and name both files; a shard without documents is not kept."""
        if not self._lengths:
            # A split that is made again may have had documents here before.
            for suffix in (".bin", ".idx"):
                (self._directory / f"{self._name}{suffix}").unlink(missing_ok=True)
            return None
        lengths = np.concatenate(self._lengths)
        index = encode_index(lengths, self._dtype)
        self._stream.flush()
        target = self._directory / f"{self._name}.bin"
        commit_file(self._stream.fileno(), Path(self._stream.name), target)
        self.is_finished = True
        write_atomic(self._directory / f"{self._name}.idx", index)
        return ShardRecord(
            name=self._name,
            sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            tokens=int(lengths.sum(dtype=np.int64)),
            documents=len(lengths),
            text_bytes=self._text_bytes,
            largest_id=self._largest_id,
            source=source,
            encoder=encoder,
            ranges=ranges,
        )


@contextmanager
def write_shard(directory: Path, name: str, dtype: str) -> Iterator[ShardWriter]:
    """Open a writer for one shard; a block left without `finish` leaves no file."""
    with NamedTemporaryFile(dir=directory, prefix=f".{name}.bin.", delete=False) as stream:
        writer = ShardWriter(stream, directory, name, dtype)
        try:
            yield writer
        finally:
            if not writer.is_finished:
                Path(stream.name).unlink()
