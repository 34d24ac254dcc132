"""From a data config to a prepared directory; Ray Data tasks make its shards."""

import fcntl
import logging
import os
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pipeline.config.data import DataConfig
from pipeline.data.assembly import build_manifest, list_differences, npy_bytes, summarise
from pipeline.data.indexed import token_dtype
from pipeline.data.plan import fingerprint, plan_options, plan_recipe
from pipeline.data.progress import OnEvent, PrepareEvent, PrepareTotals, say
from pipeline.data.ray_surroundings import (
    check_answers,
    environment_set,
    python_path,
    short_directory,
    unreachable,
)
from pipeline.data.shard_writer import ShardJob, SplitResult, is_validation, make_shards
from pipeline.data.shards import (
    MANIFEST_NAME,
    TOKEN_BYTES_NAME,
    TOKENIZER_NAME,
    ShardManifest,
    ShardSet,
    SplitName,
    load_manifest,
    write_atomic,
    write_manifest,
)
from pipeline.data.sources import (
    Source,
    Split,
    absolute_source,
    build_source,
    first_texts,
    sample_documents,
)
from pipeline.data.tokenizer import (
    TokenizerFacts,
    choose_encoder,
    load_tokenizer,
    train_tokenizer,
)
from pipeline.errors import ConfigError, DataError

OBJECT_STORE_BYTES = 200 << 20
"""Of a local Ray; only manifest rows travel through it."""


def prepare(data: DataConfig, on_event: OnEvent = lambda event: None) -> ShardManifest:
    """Tokenize a source into shards, or find that this has been done.

    Args:
        data: Source, tokenizer and split; `output_dir` or `prepared_dir` is set.
        on_event: Takes one line of progress at a time.

    Returns:
        The manifest of the prepared directory, which stands in `output_dir` under its fingerprint.

    Raises:
        ConfigError: The config names no directory.
        DataError: The source is unusable, a split would be empty, or a directory that is already
            there does not match the config. Nothing that looks finished is left behind.
        LaunchError: The Ray cluster cannot be reached.
    """
    source = build_source(data.source)
    if data.prepared_dir is not None:
        return _use_prepared(data, data.prepared_dir, source, on_event)
    if data.output_dir is None:
        raise ConfigError("data.output_dir is not set: name a directory for the prepared shards")
    recipe = plan_recipe(data, source)
    directory = data.output_dir / fingerprint(recipe)
    if not (directory / MANIFEST_NAME).exists():
        with _alone(directory, on_event):
            if not (directory / MANIFEST_NAME).exists():
                return _prepare_afresh(data, source, recipe, directory, on_event)
    return _reuse(directory, recipe, on_event)


@contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """Hold a connection to Ray: the one that is there, the cluster at an address, or a local one.

    A connection found open is left as it is. A cluster is left running. A local Ray is started
    without dashboard, log lines and tokens, is bound to loopback, and is gone afterwards together
    with its directory.

    Args:
        address: Ray address; None takes RAY_ADDRESS, and without that starts a local Ray.
        num_cpus: CPUs of a local Ray; None counts them.

    Raises:
        LaunchError: Nobody answers at the address, or what answers is no Ray of this version.
    """
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    package_root = str(Path(__file__).parents[2])
    if ray.is_initialized():
        yield
    elif address and address != "local":
        # Inside a Ray job the job's own environment brings the package, and Ray refuses a second.
        in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        runtime_env = None if in_job else {"env_vars": {"PYTHONPATH": package_root}}
        check_answers(address)
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", runtime_env=runtime_env)
        except (ConnectionError, RuntimeError, ValueError) as exc:
            raise unreachable(address, exc) from exc
        try:
            yield
        finally:
            ray.shutdown()
    else:
        with short_directory() as directory:
            variables = {
                "RAY_AUTH_MODE": "disabled",  # else Ray writes a token into the home directory
                "RAY_USAGE_STATS_ENABLED": "0",
                "PYTHONPATH": os.pathsep.join([package_root, *python_path()]),
            }
            with environment_set(variables):
                ray.init(
                    "local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=directory,
                )
            try:
                yield
            finally:
                ray.shutdown()


def run_tasks(splits: list[Split], job: ShardJob) -> Iterator[SplitResult]:
    """Make the shards of every split as Ray Data tasks, one a split, in the order they finish.

    Raises:
        DataError: A task failed; the message is the one that the task gave.
    """
    import ray.data
    import ray.exceptions

    def make(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": make_shards(row["split"], job), "error": None}
        except Exception as exc:  # Ray would hand over a traceback as text instead of this message
            return {"result": None, "error": _explain(exc, job)}

    rows = [{"split": split} for split in splits]
    try:
        with _quiet_ray_data():
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(make)
            for row in dataset.iter_rows():
                if row["error"] is not None:
                    raise DataError(row["error"])
                yield row["result"]
    except ray.exceptions.RayError as exc:
        raise DataError(f"a tokenization task was lost: {str(exc).splitlines()[0]}") from exc


def _explain(exc: Exception, job: ShardJob) -> str:
    if isinstance(exc, DataError):
        return str(exc)
    if isinstance(exc, OSError):
        return f"cannot write to {job.directory}: {exc.strerror or exc}"
    return f"a tokenization task failed: {''.join(traceback.format_exception(exc))}"


def _prepare_afresh(
    data: DataConfig, source: Source, recipe: dict[str, Any], directory: Path, on_event: OnEvent
) -> ShardManifest:
    try:
        with _writing_to(directory):
            if directory.exists():
                say(on_event, f"removing the unfinished {directory}")
                shutil.rmtree(directory)
            directory.mkdir(parents=True)
        splits = source.splits()
        tokenizer = _make_tokenizer(data, source, splits, on_event)
        choice = choose_encoder(tokenizer, first_texts(source, splits))
        for message in choice.messages:
            say(on_event, message)
        with _writing_to(directory):
            write_atomic(directory / TOKENIZER_NAME, tokenizer.tokenizer_json.encode())
            write_atomic(directory / TOKEN_BYTES_NAME, npy_bytes(tokenizer.token_bytes))
        job = ShardJob(
            source=absolute_source(data.source),
            directory=directory,
            tokenizer_json=tokenizer.tokenizer_json,
            encoder=choice.name,
            end_of_document_id=tokenizer.end_of_document_id,
            dtype=token_dtype(tokenizer.vocab_size),
            validation_fraction=data.validation_fraction,
        )
        results = _collect(splits, job, on_event)
        manifest = build_manifest(data, recipe, tokenizer, choice, job, results)
        for name in get_args(SplitName):
            ShardSet(manifest, name)
        with _writing_to(directory):
            write_manifest(manifest)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    say(on_event, f"prepared {summarise(manifest)}")
    return manifest


@contextmanager
def _writing_to(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise DataError(f"cannot write to {directory}: {exc.strerror or exc}") from exc


def _make_tokenizer(
    data: DataConfig, source: Source, splits: list[Split], on_event: OnEvent
) -> TokenizerFacts:
    config = data.tokenizer
    if config.path is not None:
        return load_tokenizer(Path(config.path).expanduser(), config.end_of_document)
    say(
        on_event,
        f"training a byte-level BPE of {config.vocab_size} entries on the training documents",
    )
    started = time.perf_counter()
    tokenizer = train_tokenizer(
        (
            document.text
            for document in sample_documents(source, splits)
            if not is_validation(document.id, data.validation_fraction)
        ),
        config,
    )
    seconds = time.perf_counter() - started
    say(on_event, f"trained a tokenizer of {tokenizer.vocab_size} entries in {seconds:.1f} s")
    return tokenizer


def _collect(splits: list[Split], job: ShardJob, on_event: OnEvent) -> list[SplitResult]:
    say(on_event, "starting Ray, or joining the one that is there")
    results: list[SplitResult] = []
    with ray_session():
        files = {piece.name for split in splits for piece in split.pieces}
        totals = PrepareTotals(num_splits=len(splits), num_files=len(files))
        line = f"tokenizing the source, cut into {len(splits)}"
        on_event(PrepareEvent(message=line, totals=totals, directory=job.directory))
        started = time.perf_counter()
        for result in run_tasks(splits, job):
            results.append(result)
            records = result.shards.values()
            num_bytes = sum(record.text_bytes for record in records)
            totals = replace(
                totals,
                num_splits_done=len(results),
                documents=totals.documents + sum(r.documents for r in records),
                text_bytes=totals.text_bytes + num_bytes,
                tokens=totals.tokens + sum(r.tokens for r in records),
                dropped_documents=Counter(totals.dropped_documents)
                + Counter(result.dropped_documents),
                seconds=time.perf_counter() - started,
            )
            line = (
                f"tokenized {len(results)}/{len(splits)}: {sum(r.documents for r in records):,} "
                f"documents, {sum(r.tokens for r in records):,} tokens, "
                f"{num_bytes / 1e6 / result.seconds:.1f} MB/s in its task"
            )
            on_event(PrepareEvent(message=line, totals=totals, directory=job.directory))
        say(on_event, f"tokenized all in {time.perf_counter() - started:.1f} s")
    return sorted(results, key=lambda result: result.index)


def _reuse(directory: Path, recipe: dict[str, Any], on_event: OnEvent) -> ShardManifest:
    manifest = load_manifest(directory)
    if manifest.fingerprint != fingerprint(recipe) or manifest.recipe != recipe:
        differences = list_differences(manifest.recipe, recipe)
        raise DataError(
            f"{directory} was made from something else ({differences}); delete it and prepare again"
        )
    for name in get_args(SplitName):
        ShardSet(manifest, name)
    say(on_event, f"reusing {summarise(manifest)}")
    return manifest


def _use_prepared(
    data: DataConfig, directory: Path, source: Source, on_event: OnEvent
) -> ShardManifest:
    manifest = load_manifest(directory)
    try:
        recipe = plan_recipe(data, source)
    except DataError as exc:
        # Shards outlive their source: a run may resume where the text has never been.
        say(on_event, f"the text of {directory} is not compared: {exc}")
        recipe = {**plan_options(data), "contents": manifest.recipe["contents"]}
    if manifest.recipe != recipe:
        differences = list_differences(manifest.recipe, recipe)
        raise DataError(
            f"data.prepared_dir={directory} was not made from this config ({differences}); "
            "remove data.prepared_dir to prepare again"
        )
    return manifest


@contextmanager
def _alone(directory: Path, on_event: OnEvent) -> Iterator[None]:
    """Keep other processes from preparing the same directory; a killed one lets go by itself."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        stream = (directory.parent / f".{directory.name}.lock").open("w")
    except OSError as exc:
        raise DataError(f"cannot write to {directory.parent}: {exc.strerror}") from exc
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(on_event, f"waiting for another process that prepares {directory}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    from ray.data import DataContext

    context = DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars = context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
        logger.setLevel(level)
