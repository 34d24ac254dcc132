"""The work of preparing: tokenizer, duplicates, one Ray task a split, manifest; resumable."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pipeline.config.data import DataConfig
from pipeline.data.assembly import build_manifest, npy_bytes, summarise
from pipeline.data.dedup_ray import find_duplicates, forget_signatures
from pipeline.data.documents import record_place
from pipeline.data.encoder_choice import EncoderChoice, choose_encoder
from pipeline.data.identities import find_repeated
from pipeline.data.indexed import token_dtype
from pipeline.data.ledger import (
    WORK_DIR,
    SplitResult,
    close_ledger,
    forget,
    open_ledger,
    read_results,
)
from pipeline.data.make_shards import ShardJob, cleaned_texts, is_validation, make_shards
from pipeline.data.progress import OnEvent, PrepareEvent, ProgressCounter, say
from pipeline.data.ray_tasks import explain_failure, ray_session, run_each
from pipeline.data.sampling import first_texts, sample_documents
from pipeline.data.shards import (
    TOKEN_BYTES_NAME,
    TOKENIZER_NAME,
    ShardManifest,
    ShardSet,
    SplitName,
    write_atomic,
    write_manifest,
)
from pipeline.data.sources import Split, build_sources, check_listed, pinned_sources, plan_splits
from pipeline.data.split_reader import RecordKey
from pipeline.data.tokenizer import TokenizerFacts, load_tokenizer, train_tokenizer
from pipeline.errors import DataError

Exclusions = dict[int, dict[RecordKey, str]]
"""By split, the records that are left out, with the reason."""


class Preparation:
    """One preparation that nobody else works on."""

    def __init__(
        self, data: DataConfig, recipe: dict[str, Any], directory: Path, on_event: OnEvent
    ) -> None:
        self._data = pinned_sources(data, recipe["contents"])
        self._sources = build_sources(self._data)
        self._recipe = recipe
        self._directory = directory
        self._on_event = on_event

    def run(self) -> ShardManifest:
        """Make what is missing, then the manifest."""
        splits = plan_splits(self._sources)
        check_listed(self._data, splits, self._recipe["contents"])
        tokenizer = self._tokenizer(splits)
        choice = choose_encoder(tokenizer, first_texts(self._data, self._sources, splits))
        for message in choice.messages:
            say(self._on_event, message)
        job = ShardJob(
            data=self._data,
            directory=self._directory,
            tokenizer_json=tokenizer.tokenizer_json,
            encoder=choice.name,
            end_of_document_id=tokenizer.end_of_document_id,
            dtype=token_dtype(tokenizer.vocab_size),
        )
        with _writing_to(self._directory):
            open_ledger(self._directory, self._job_digest(tokenizer))
            write_atomic(self._directory / TOKENIZER_NAME, tokenizer.tokenizer_json.encode())
            write_atomic(self._directory / TOKEN_BYTES_NAME, npy_bytes(tokenizer.token_bytes))
        results = self._make_all(splits, job)
        manifest = self._finish(tokenizer, choice, job, results)
        self._on_event(
            PrepareEvent(
                message=f"prepared {summarise(manifest)}",
                totals=self._counter.totals,
                directory=self._directory,
                is_finished=True,
            )
        )
        return manifest

    def _tokenizer(self, splits: list[Split]) -> TokenizerFacts:
        config = self._data.tokenizer
        if config.path is not None:
            return load_tokenizer(
                Path(config.path).expanduser(),
                config.end_of_document,
                config.special_tokens_in_text,
            )
        trained = self._directory / TOKENIZER_NAME
        if trained.exists():
            # Left by a call that was killed; the ledger vouches for shards made with this one only.
            say(self._on_event, f"using the tokenizer that was trained before in {trained}")
            return load_tokenizer(trained, config.end_of_document, config.special_tokens_in_text)
        size = f"{config.vocab_size} entries"
        say(self._on_event, f"training a byte-level BPE of {size} on the training documents")
        started = time.perf_counter()
        documents = sample_documents(self._data, self._sources, splits)
        fraction = self._data.validation_fraction
        tokenizer = train_tokenizer(
            (d.text for d in documents if not is_validation(d.id, fraction)), config
        )
        seconds = time.perf_counter() - started
        size = f"{tokenizer.vocab_size} entries"
        say(self._on_event, f"trained a tokenizer of {size} in {seconds:.1f} s")
        with _writing_to(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomic(trained, tokenizer.tokenizer_json.encode())
        return tokenizer

    def _job_digest(self, tokenizer: TokenizerFacts) -> str:
        parts = [json.dumps(self._recipe, sort_keys=True), tokenizer.tokenizer_json]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _make_all(self, splits: list[Split], job: ShardJob) -> list[SplitResult]:
        allow_bad = self._data.on_bad_input == "quarantine"
        done = read_results(self._directory, len(splits), job.dtype, allow_bad=allow_bad)
        self._counter = ProgressCounter(splits, list(done.values()), self._directory)
        if done:
            say(self._on_event, f"going on: {len(done)} of {len(splits)} splits are done")
        if len(done) < len(splits):
            say(self._on_event, "starting Ray, or joining the one that is there")
        with ray_session():
            exclusions = self._find_duplicates(splits, job)
            self._counter.start()
            self._on_event(self._counter.event(f"tokenizing the source, cut into {len(splits)}"))
            missing = [split for split in splits if split.index not in done]
            done |= self._make(missing, job, exclusions)
            done |= self._without_repeated(splits, job, exclusions)
        return [done[split.index] for split in splits]

    def _find_duplicates(self, splits: list[Split], job: ShardJob) -> Exclusions:
        """Find the documents whose text stood earlier, comparing what the filters leave.

        Raises:
            DataError: The text is bad, and the policy is to fail.
        """
        if self._data.clean.deduplicate == "none":
            return {}
        work_dir = self._directory / WORK_DIR / "signatures"
        clean = self._data.clean
        found = find_duplicates(
            splits, partial(cleaned_texts, job, {}), clean, work_dir, self._on_event
        )
        repeated = self._find_repeated(splits)
        if not repeated:
            return found
        # A document without a right to its id must not be the one that stays of its duplicates.
        for index in repeated:
            forget_signatures(work_dir, index)
        read = partial(cleaned_texts, job, repeated)
        found = find_duplicates(splits, read, clean, work_dir, self._on_event)
        return _joined(found, repeated)

    def _make(
        self, splits: list[Split], job: ShardJob, exclusions: Exclusions
    ) -> dict[int, SplitResult]:
        items = [(split, exclusions.get(split.index)) for split in splits]
        results = {}
        for result in run_each(
            partial(_make_item, job), items, partial(explain_failure, job.directory)
        ):
            results[result.index] = result
            self._counter.add(result)
            self._on_event(self._counter.event(_describe(result, self._counter)))
            for note in result.notes:
                say(self._on_event, note)
        return results

    def _without_repeated(
        self, splits: list[Split], job: ShardJob, exclusions: Exclusions
    ) -> dict[int, SplitResult]:
        """Make the splits anew in which ids stand that were given before.

        Raises:
            DataError: There are such ids, and the policy is to fail.
        """
        repeated = self._find_repeated(splits)
        affected = [split for split in splits if split.index in repeated]
        for split in affected:
            forget(self._directory, split.index)
            self._counter.remove(split.index)
        return self._make(affected, job, _joined(exclusions, repeated))

    def _find_repeated(self, splits: list[Split]) -> Exclusions:
        """Find the documents whose id was given before.

        Raises:
            DataError: There are some, and the policy is to fail.
        """
        repeated = find_repeated(self._directory, splits)
        if repeated and self._data.on_bad_input == "fail":
            raise DataError(self._describe_repeated(splits, repeated))
        return repeated

    def _describe_repeated(self, splits: list[Split], repeated: Exclusions) -> str:
        index = min(repeated)
        number, ordinal = min(repeated[index])
        split = splits[index]
        piece = split.pieces[number]
        records = self._sources[split.source].read(piece)
        record = next(r for i, r in enumerate(records) if i == ordinal)
        total = sum(len(places) for places in repeated.values())
        field = self._data.source_field(split.source)
        return (
            f"{record_place(piece, ordinal)}: the id {getattr(record, 'id', '')!r} has been given "
            f"before in source {split.source!r}; {total} such documents in all. Make ids unique, "
            f"or make them from places ({field}.id_column=null), or leave out all but the first "
            "(data.on_bad_input=quarantine)"
        )

    def _finish(
        self,
        tokenizer: TokenizerFacts,
        choice: EncoderChoice,
        job: ShardJob,
        results: list[SplitResult],
    ) -> ShardManifest:
        manifest = build_manifest(self._data, self._recipe, tokenizer, choice, job, results)
        for name in get_args(SplitName):
            ShardSet(manifest, name)
        with _writing_to(self._directory):
            write_manifest(manifest)
            close_ledger(self._directory)
        return manifest


def _joined(first: Exclusions, second: Exclusions) -> Exclusions:
    return {i: {**first.get(i, {}), **second.get(i, {})} for i in {**first, **second}}


def _make_item(job: ShardJob, item: tuple[Split, dict[RecordKey, str] | None]) -> SplitResult:
    split, exclusions = item
    return make_shards(split, job, exclusions)


def _describe(result: SplitResult, counter: ProgressCounter) -> str:
    records = result.shards.values()
    num_bytes = sum(record.text_bytes for record in records)
    totals = counter.totals
    return (
        f"tokenized {totals.num_splits_done}/{totals.num_splits}: "
        f"{sum(r.documents for r in records):,} documents, "
        f"{sum(r.tokens for r in records):,} tokens, "
        f"{num_bytes / 1e6 / result.seconds:.1f} MB/s in its task"
    )


@contextmanager
def _writing_to(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise DataError(f"cannot write to {directory}: {exc.strerror or exc}") from exc
