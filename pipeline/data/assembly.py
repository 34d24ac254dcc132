"""From the results of all tasks to the manifest that makes their shards a prepared directory."""

import io
from collections import Counter
from hashlib import sha256
from typing import Any, get_args

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.encoder_choice import EncoderChoice
from pipeline.data.ledger import SplitResult
from pipeline.data.make_shards import ShardJob
from pipeline.data.plan import fingerprint
from pipeline.data.shards import ShardManifest, SplitName, SplitRecord
from pipeline.data.tokenizer import TokenizerFacts
from pipeline.errors import DataError


def build_manifest(
    data: DataConfig,
    recipe: dict[str, Any],
    tokenizer: TokenizerFacts,
    choice: EncoderChoice,
    job: ShardJob,
    results: list[SplitResult],
) -> ShardManifest:
    """Add up the results of all tasks, in the order of the splits.

    Raises:
        DataError: The training or the validation split has no document.
    """
    dropped, quarantined = Counter[str](), Counter[str]()
    for result in results:
        dropped.update(result.dropped_documents)
        quarantined.update(result.quarantined_documents)
    splits = {name: _split_record(name, results) for name in get_args(SplitName)}
    _check_split(data, splits, results, dropped)
    return ShardManifest(
        fingerprint=fingerprint(recipe),
        recipe=recipe,
        vocab_size=tokenizer.vocab_size,
        dtype=job.dtype,
        end_of_document=data.tokenizer.end_of_document,
        end_of_document_id=tokenizer.end_of_document_id,
        tokenizer_sha256=sha256(tokenizer.tokenizer_json.encode()).hexdigest(),
        token_bytes_sha256=sha256(npy_bytes(tokenizer.token_bytes)).hexdigest(),
        encoder=choice.name,
        encoder_version=choice.version,
        splits=splits,
        input_documents=sum(result.input_documents for result in results),
        dropped_documents=dict(sorted(dropped.items())),
        quarantined_documents=dict(sorted(quarantined.items())),
        bad_files=[entry for result in results for entry in result.bad_files],
        directory=job.directory,
    )


def _split_record(name: SplitName, results: list[SplitResult]) -> SplitRecord:
    shards = [result.shards[name] for result in results if name in result.shards]
    return SplitRecord(
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        shards=shards,
    )


def _check_split(
    data: DataConfig,
    splits: dict[SplitName, SplitRecord],
    results: list[SplitResult],
    dropped: Counter[str],
) -> None:
    """Refuse a split without documents, naming the fraction that would fill it.

    Raises:
        DataError: One of the two splits is empty.
    """
    num_documents = sum(split.documents for split in splits.values())
    if num_documents == 0:
        raise DataError(f"the source has no document with text in it; dropped: {dict(dropped)}")
    empty = [name for name, split in splits.items() if split.documents == 0]
    if not empty:
        return
    given = f"data.validation_fraction={data.validation_fraction} of {num_documents} documents"
    if num_documents == 1:
        (name,) = {shard.source for split in splits.values() for shard in split.shards}
        cut = f"{data.source_field(name)}.document_bytes=4096"
        advice = f"give at least two documents; {cut} cuts a text file"
    elif empty == ["validation"]:
        nearest = min(result.smallest_hash for result in results)
        advice = f"nearest that works: data.validation_fraction={nearest + 1e-4:.4f}"
    else:
        nearest = max(result.largest_hash for result in results)
        advice = f"nearest that works: data.validation_fraction={nearest - 1e-4:.4f}"
    raise DataError(f"the {empty[0]} split is empty ({given}); {advice}")


def list_differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Say in which parts two recipes differ."""
    names = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    return "; ".join(
        "other source text"
        if name == "contents"
        else f"{name}: {found.get(name)}, the config says {wanted.get(name)}"
        for name in names
    )


def summarise(manifest: ShardManifest) -> str:
    """Say in one line what a prepared directory holds."""
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    num_bytes = train.text_bytes + validation.text_bytes
    num_tokens = train.tokens + validation.tokens - train.documents - validation.documents
    return (
        f"{manifest.directory}: {train.tokens:,} training tokens in {train.documents:,} documents, "
        f"{validation.tokens:,} validation tokens in {validation.documents:,}, "
        f"{num_bytes / num_tokens:.2f} bytes per token"
    )


def npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """Give the bytes of an array's `.npy` file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
