"""From one split of a source to its shards and their manifest rows.

A shard is a function of its split, the tokenizer and the validation fraction, and of nothing else:
not of the number of workers, nor of the order in which they finish.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, get_args

import numpy as np
import numpy.typing as npt

from pipeline.config.data import SourceConfig
from pipeline.data.documents import Document
from pipeline.data.indexed import encode_index, little_endian
from pipeline.data.shards import (
    ShardRecord,
    SourceRange,
    SplitName,
    commit_file,
    write_atomic,
)
from pipeline.data.sources import Split, build_source
from pipeline.data.tokenizer import Encoder, build_encoder

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 23
SINGLE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""One task uses one core; the parallelism is that of the tasks."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What every task of one preparation knows; it travels to the workers."""

    source: SourceConfig
    directory: Path
    tokenizer_json: str
    encoder: str
    end_of_document_id: int
    dtype: str
    validation_fraction: float


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """What became of one split of the source."""

    index: int
    shards: dict[SplitName, ShardRecord]
    dropped_documents: dict[str, int]
    smallest_hash: float
    """Smallest hash of a document id, in [0, 1): the validation fraction that would reach it."""
    largest_hash: float
    seconds: float


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

    def add(
        self, tokens: npt.NDArray[Any], lengths_tokens: npt.NDArray[Any], text_bytes: int
    ) -> None:
        """Append documents.

        Args:
            tokens: Ids of all documents back to back, end-of-document tokens included.
            lengths_tokens: Tokens of each document.
            text_bytes: UTF-8 bytes of the documents.
        """
        data = tokens.astype(little_endian(self._dtype)).tobytes()
        self._stream.write(data)
        self._digest.update(data)
        self._lengths.append(lengths_tokens.astype(np.int32))
        self._text_bytes += text_bytes
        self._largest_id = max(self._largest_id, int(tokens.max()))

    def finish(self, source: str, encoder: str, ranges: list[SourceRange]) -> ShardRecord | None:
        """Write the index and name both files; a shard without documents is not kept."""
        if not self._lengths:
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


def hash_fraction(document_id: str) -> float:
    """Give the hash of a document id as a number in [0, 1), the same everywhere and always."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:6]) / 2**48


def is_validation(document_id: str, validation_fraction: float) -> bool:
    """Tell whether a document is held out; a larger fraction keeps those already held out."""
    return hash_fraction(document_id) < validation_fraction


def make_shards(split: Split, job: ShardJob) -> SplitResult:
    """Tokenize one split and write its shards.

    Raises:
        DataError: The source cannot be read; no shard of this split is left behind.
    """
    os.environ.update(SINGLE_THREAD)
    started = time.perf_counter()
    encoder = build_encoder(job.encoder, job.tokenizer_json)
    sorter = _Sorter(validation_fraction=job.validation_fraction)
    ranges = [SourceRange(name=p.name, start=p.start, stop=p.stop) for p in split.pieces]
    shards: dict[SplitName, ShardRecord] = {}
    with ExitStack() as stack:
        writers: dict[SplitName, ShardWriter] = {
            name: stack.enter_context(
                write_shard(job.directory, f"{name}-{split.index:05d}", job.dtype)
            )
            for name in get_args(SplitName)
        }
        for name, texts in sorter.batches(build_source(job.source).read(split)):
            sorter.dropped["no_tokens"] += _encode_into(writers[name], encoder, texts, job)
        for name, writer in writers.items():
            if (record := writer.finish(job.source.kind, job.encoder, ranges)) is not None:
                shards[name] = record
    return SplitResult(
        index=split.index,
        shards=shards,
        dropped_documents={reason: n for reason, n in sorter.dropped.items() if n},
        smallest_hash=sorter.smallest_hash,
        largest_hash=sorter.largest_hash,
        seconds=time.perf_counter() - started,
    )


@dataclass(kw_only=True)
class _Sorter:
    """Sorts documents by split and gathers them to batches worth one call of the encoder."""

    validation_fraction: float
    dropped: Counter[str] = field(default_factory=Counter)
    smallest_hash: float = 1.0
    largest_hash: float = 0.0

    def batches(self, documents: Iterable[Document]) -> Iterator[tuple[SplitName, list[str]]]:
        waiting: dict[SplitName, list[str]] = {name: [] for name in get_args(SplitName)}
        characters = dict.fromkeys(waiting, 0)
        for document in documents:
            if not document.text or document.text.isspace():
                self.dropped["empty"] += 1
                continue
            fraction = hash_fraction(document.id)
            self.smallest_hash = min(self.smallest_hash, fraction)
            self.largest_hash = max(self.largest_hash, fraction)
            name: SplitName = "validation" if fraction < self.validation_fraction else "train"
            waiting[name].append(document.text)
            characters[name] += len(document.text)
            if len(waiting[name]) == BATCH_DOCUMENTS or characters[name] >= BATCH_CHARACTERS:
                yield name, waiting[name]
                waiting[name], characters[name] = [], 0
        yield from ((name, texts) for name, texts in waiting.items() if texts)


def _encode_into(writer: ShardWriter, encoder: Encoder, texts: list[str], job: ShardJob) -> int:
    """Append encoded documents, each closed; give the number of those that had no tokens."""
    ids, offsets = encoder.encode(texts)
    lengths = np.diff(offsets)
    kept = lengths > 0
    if kept.any():
        closed = np.insert(ids.astype(np.int64), offsets[1:][kept], job.end_of_document_id)
        text_bytes = sum(len(t.encode()) for t, keep in zip(texts, kept, strict=True) if keep)
        writer.add(closed, lengths[kept] + 1, text_bytes)
    return int((~kept).sum())
