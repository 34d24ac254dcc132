"""From one split of a source to its shards and what became of each of its records.

A shard is a function of its split, the config and the tokenizer, and of nothing else: not of the
number of workers, nor of the order in which they finish.
"""

import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.documents import BadFile, Document, utf8_bytes
from pipeline.data.encoder_choice import CHECKED_FILE_CHARACTERS, EncoderCheck, EncoderMismatch
from pipeline.data.encoders import REFERENCE, Encoder, build_encoder
from pipeline.data.filters import build_cleaner
from pipeline.data.identities import IdentityWriter
from pipeline.data.indexed import little_endian
from pipeline.data.ledger import SplitResult, write_result
from pipeline.data.shard_writer import ShardWriter, write_shard
from pipeline.data.shards import ShardRecord, SourceRange, SplitName
from pipeline.data.sources import Source, Split, build_sources
from pipeline.data.split_reader import BadPiece, RecordKey, SplitReader

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 23
WRITTEN_TOKENS = 1 << 22
SINGLE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""One task uses one core; the parallelism is that of the tasks."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What every task of one preparation knows; it travels to the workers."""

    data: DataConfig
    """With paths that hold on every node."""
    directory: Path
    """The prepared directory."""
    tokenizer_json: str
    encoder: str
    end_of_document_id: int
    dtype: str


def hash_fraction(document_id: str) -> float:
    """Give the hash of a document id as a number in [0, 1), the same everywhere and always."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:6]) / 2**48


def is_validation(document_id: str, validation_fraction: float) -> bool:
    """Tell whether a document is held out; a larger fraction keeps those already held out."""
    return hash_fraction(document_id) < validation_fraction


def make_shards(
    split: Split, job: ShardJob, exclusions: Mapping[RecordKey, str] | None = None
) -> SplitResult:
    """Tokenize one split, write its shards, and enter it in the ledger.

    Args:
        split: What to read.
        job: How.
        exclusions: Records of this split to leave out, with the reason.

    Raises:
        DataError: The source cannot be read; no shard of this split is left behind.
    """
    os.environ.update(SINGLE_THREAD)
    source = build_sources(job.data)[split.source]
    encoder_name = job.encoder
    notes: list[str] = []
    cleaner = build_cleaner(job.data.clean)
    reader = SplitReader(
        split, job.data, source, cleaner, exclusions=exclusions, aside_dir=job.directory
    )
    while True:
        try:
            result = _attempt(split, job, reader, encoder_name, notes)
        except BadPiece as bad:
            # Documents of the piece are in the batches already, so the split begins anew, and it
            # does so once, however many pieces are bad.
            reader.leave_out(bad.number, bad.error)
            _leave_out_bad(source, split, reader)
            continue
        except EncoderMismatch as exc:
            encoder_name, notes = REFERENCE, [str(exc)]
            continue
        write_result(job.directory, result)
        return result


def _attempt(
    split: Split, job: ShardJob, reader: SplitReader, encoder_name: str, notes: list[str]
) -> SplitResult:
    started = time.perf_counter()
    special_tokens_in_text = job.data.tokenizer.special_tokens_in_text
    encoder = build_encoder(encoder_name, job.tokenizer_json, special_tokens_in_text)
    check = EncoderCheck(encoder_name, job.tokenizer_json, special_tokens_in_text)
    sorter = _Sorter(validation_fraction=job.data.validation_fraction)
    ranges = [SourceRange(name=p.name, start=p.start, stop=p.stop) for p in split.pieces]
    shards: dict[SplitName, ShardRecord] = {}
    num_without_tokens = 0
    with ExitStack() as stack:
        identities = stack.enter_context(IdentityWriter(job.directory, split))
        writers: dict[SplitName, ShardWriter] = {
            name: stack.enter_context(
                write_shard(job.directory, f"{name}-{split.index:05d}", job.dtype)
            )
            for name in get_args(SplitName)
        }
        documents = _checked(identities.noting(reader.documents()), check)
        for name, batch in sorter.batches(documents):
            if isinstance(batch, list):
                num_without_tokens += _encode_into(writers[name], encoder, batch, job)
            else:
                num_without_tokens += _encode_long_into(writers[name], encoder, batch, job)
            del batch  # no name may hold a long text while the next one is read
        for name, writer in writers.items():
            if (record := writer.finish(split.source, encoder_name, ranges)) is not None:
                shards[name] = record
        identities.commit()
    counts = reader.counts
    counts.dropped["no_tokens"] += num_without_tokens
    return SplitResult(
        index=split.index,
        shards=shards,
        input_documents=counts.input_documents,
        dropped_documents=_positive(counts.dropped),
        quarantined_documents=_positive(counts.quarantined),
        bad_files=counts.bad_files,
        notes=notes,
        smallest_hash=sorter.smallest_hash,
        largest_hash=sorter.largest_hash,
        seconds=time.perf_counter() - started,
    )


def cleaned_texts(
    job: ShardJob, exclusions: Mapping[int, Mapping[RecordKey, str]], split: Split
) -> Iterator[tuple[RecordKey, str]]:
    """Yield what the filters leave of a split, with the places of the documents, to compare texts.

    The given ids are noted as by `make_shards`. Where bad input is quarantined, every piece is read
    to its end first: a text that was compared cannot be taken back.

    Args:
        job: How to read.
        exclusions: By split, the records that are left out.
        split: What to read.

    Raises:
        DataError: The source is bad, and the policy is to fail.
    """
    os.environ.update(SINGLE_THREAD)
    source = build_sources(job.data)[split.source]
    cleaner = build_cleaner(job.data.clean)
    reader = SplitReader(split, job.data, source, cleaner, exclusions.get(split.index))
    if job.data.on_bad_input == "quarantine":
        _leave_out_bad(source, split, reader)
    try:
        with IdentityWriter(job.directory, split) as identities:
            for key, document in identities.noting(reader.documents()):
                yield key, document.text
            identities.commit()
    except BadPiece as bad:
        raise bad.error from bad


def _leave_out_bad(source: Source, split: Split, reader: SplitReader) -> None:
    """Read every piece to its end, and leave out those that cannot be."""
    for number, piece in enumerate(split.pieces):
        try:
            deque(source.read(piece), maxlen=0)
        except BadFile as exc:
            reader.leave_out(number, exc)


@dataclass(kw_only=True)
class _Sorter:
    """Sorts documents by split and gathers them to batches worth one call of the encoder."""

    validation_fraction: float
    smallest_hash: float = 1.0
    largest_hash: float = 0.0
    _waiting: dict[SplitName, list[str]] = field(
        default_factory=lambda: {name: [] for name in get_args(SplitName)}
    )

    def batches(
        self, documents: Iterable[Document]
    ) -> Iterator[tuple[SplitName, list[str] | tuple[str, ...]]]:
        """Yield texts in lists, and a long one by itself as the tuple of its parts."""
        characters = dict.fromkeys(self._waiting, 0)
        for document in documents:
            fraction = hash_fraction(document.id)
            self.smallest_hash = min(self.smallest_hash, fraction)
            self.largest_hash = max(self.largest_hash, fraction)
            name: SplitName = "validation" if fraction < self.validation_fraction else "train"
            texts, parts = self._waiting[name], document.parts
            characters[name] += document.num_characters
            del document
            if len(parts) == 1:
                texts.append(parts[0])
            is_full = len(texts) == BATCH_DOCUMENTS or characters[name] >= BATCH_CHARACTERS
            if is_full or len(parts) != 1:
                self._waiting[name], characters[name] = [], 0
                if texts:
                    yield name, texts
                if len(parts) != 1:
                    yield name, parts
            del texts, parts
        yield from ((name, texts) for name, texts in self._waiting.items() if texts)


def _checked(
    documents: Iterable[tuple[RecordKey, Document]], check: EncoderCheck
) -> Iterator[Document]:
    """Compare the encoder with the reference on the first documents of each file.

    Raises:
        EncoderMismatch: They differ.
    """
    for _, document in documents:
        check.check(document.source, document.id, document.beginning(CHECKED_FILE_CHARACTERS))
        yield document
        del document  # no name may hold a long text while the next one is read


def _encode_into(writer: ShardWriter, encoder: Encoder, texts: list[str], job: ShardJob) -> int:
    """Append encoded documents, each closed; give the number of those that had no tokens."""
    ids, offsets = encoder.encode(texts)
    lengths = np.diff(offsets)
    kept = lengths > 0
    ends = offsets[1:][kept]
    # In parts, because of one long document all ids would be held three times.
    for start in range(0, len(ids), WRITTEN_TOKENS):
        part = ids[start : start + WRITTEN_TOKENS].astype(little_endian(job.dtype))
        inside = ends[(ends > start) & (ends <= start + len(part))]
        writer.write(np.insert(part, inside - start, job.end_of_document_id))
    text_bytes = sum(utf8_bytes(t) for t, keep in zip(texts, kept, strict=True) if keep)
    writer.add(lengths[kept] + 1, text_bytes)
    return int((~kept).sum())


def _encode_long_into(
    writer: ShardWriter, encoder: Encoder, parts: tuple[str, ...], job: ShardJob
) -> int:
    """Append one long document piece by piece; give 1 where it had no tokens."""
    length = 0
    for ids in encoder.encode_parts(parts):
        if len(ids):
            writer.write(ids.astype(little_endian(job.dtype)))
        length += len(ids)
    if length:
        writer.write(np.array([job.end_of_document_id], dtype=little_endian(job.dtype)))
        writer.add(np.array([length + 1]), sum(map(utf8_bytes, parts)))
    return int(length == 0)


def _positive(counts: Counter[str]) -> dict[str, int]:
    return {reason: number for reason, number in sorted(counts.items()) if number}
