"""The ids of `tokenizers` for every document, and how many documents of a contender differ."""

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.indexed import read_index
from pipeline.data.shards import ShardManifest, load_manifest
from tests.bench.corpora import Corpus, CorpusDocument, is_held_out
from tests.bench.reference_encoder import encode_by_reference

Ids = npt.NDArray[np.uint16]
NUM_PROCESSES = 2
BATCH_DOCUMENTS = 64


def reference_ids(tokenizer: Path, documents: Sequence[CorpusDocument]) -> dict[str, Ids]:
    """Give the ids of each document by the document's id."""
    texts = [document.text for document in documents]
    starts = range(0, len(texts), BATCH_DOCUMENTS)
    batches = [texts[start : start + BATCH_DOCUMENTS] for start in starts]
    encode = partial(_short_ids, str(tokenizer))
    with multiprocessing.get_context("spawn").Pool(NUM_PROCESSES) as pool:
        encoded = [ids for batch in pool.imap(encode, batches) for ids in batch]
    return {document.id: ids for document, ids in zip(documents, encoded, strict=True)}


def differing_in_shards(
    directory: Path, corpus: Corpus, expected: Mapping[str, Ids], validation_fraction: float
) -> int:
    """Compare prepared shards with the reference; give the number of documents that differ.

    The shards of a split hold its documents in the order of the source, each closed by the
    end-of-document token. A document too many or too few counts as one that differs.
    """
    manifest = load_manifest(directory)
    differing = 0
    for name in ("train", "validation"):
        held_out = name == "validation"
        wanted = (
            expected[original]
            for document_id, original in corpus.document_ids
            if is_held_out(document_id, validation_fraction) == held_out
        )
        found = (
            document
            for shard in manifest.splits[name].shards
            for document in shard_documents(manifest, shard.name)
        )
        end = np.array([manifest.end_of_document_id], dtype=np.uint16)
        differing += _num_differing(found, (np.append(ids, end) for ids in wanted))
    return differing


def differing_in_datasets(directory: Path, expected: Mapping[str, Ids]) -> int:
    """Compare a saved dataset with the reference."""
    import datasets

    table = datasets.load_from_disk(str(directory)).data
    return _num_differing_rows(table.column("id"), table.column("ids"), expected)


def differing_in_parquet(directory: Path, expected: Mapping[str, Ids]) -> int:
    """Compare a directory of Parquet files with the reference."""
    import pyarrow.parquet as pq

    table = pq.read_table(str(directory))
    return _num_differing_rows(table.column("id"), table.column("ids"), expected)


def differing_in_megatron(corpus: Corpus, expected: Mapping[str, Ids], prefix: Path) -> int:
    """Compare an indexed dataset that closes each document with the reference."""
    tokens = np.memmap(prefix.with_suffix(".bin"), dtype="<u2", mode="r")
    index = read_index(prefix.with_suffix(".idx"))
    stops = np.cumsum(index.lengths_tokens, dtype=np.int64)
    found = (
        tokens[stop - length : stop - 1]
        for stop, length in zip(stops, index.lengths_tokens, strict=True)
    )
    return _num_differing(found, (expected[original] for _, original in corpus.document_ids))


def differing_in_datatrove(
    directory: Path, files: Sequence[Sequence[str]], expected: Mapping[str, Ids]
) -> int:
    """Compare datatrove's token files with the reference.

    Args:
        directory: Holds one `.ds` and `.ds.index` for each task.
        files: Document ids of each input file; task r reads every num_tasks-th file from r on.
        expected: The reference.
    """
    paths = sorted(directory.glob("*.ds"))
    differing = 0
    for task, path in enumerate(paths):
        tokens = np.memmap(path, dtype="<u2", mode="r")
        stops = np.fromfile(f"{path}.index", dtype="<u8").astype(np.int64)
        starts = np.concatenate([[0], stops[:-1]])
        found = (tokens[a : b - 1] for a, b in zip(starts, stops, strict=True))
        wanted = (expected[one] for file in files[task :: len(paths)] for one in file)
        differing += _num_differing(found, wanted)
    return differing


def shard_documents(manifest: ShardManifest, shard: str) -> Iterator[Ids]:
    """Yield the documents of one of our shards, end-of-document token included."""
    prefix = manifest.directory / shard
    tokens = np.memmap(f"{prefix}.bin", dtype="<u2", mode="r")
    lengths = read_index(Path(f"{prefix}.idx")).lengths_tokens
    stops = np.cumsum(lengths, dtype=np.int64)
    for stop, length in zip(stops, lengths, strict=True):
        yield tokens[stop - length : stop]


def _num_differing(found: Iterable[Ids], wanted: Iterable[Ids]) -> int:
    """Count the documents that differ or have no partner."""
    left, right = iter(found), iter(wanted)
    differing = 0
    while True:
        one, other = next(left, None), next(right, None)
        if one is None and other is None:
            return differing
        differing += one is None or other is None or not np.array_equal(one, other)


def _num_differing_rows(names: Any, ids: Any, expected: Mapping[str, Ids]) -> int:
    differing, seen = 0, set()
    for name, row in zip(names, ids, strict=True):
        key = name.as_py()
        seen.add(key)
        differing += not np.array_equal(row.values.to_numpy(), expected[key])
    return differing + len(set(expected) - seen)


def _short_ids(tokenizer: str, texts: list[str]) -> list[Ids]:
    return [np.array(ids, dtype=np.uint16) for ids in encode_by_reference(tokenizer, texts)]
