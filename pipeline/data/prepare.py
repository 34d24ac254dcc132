"""From a data config to a prepared directory; Ray tasks make its shards."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from pipeline.config.data import DataConfig
from pipeline.data.assembly import list_differences, summarise
from pipeline.data.filters import check_filters
from pipeline.data.ledger import WORK_DIR, close_ledger
from pipeline.data.plan import fingerprint, plan_options, plan_recipe
from pipeline.data.preparation import Preparation
from pipeline.data.progress import OnEvent, say
from pipeline.data.shards import (
    MANIFEST_NAME,
    ShardManifest,
    ShardSet,
    SplitName,
    load_manifest,
)
from pipeline.data.sources import Source, build_sources
from pipeline.data.staging import stage
from pipeline.errors import ConfigError, DataError


def prepare(data: DataConfig, on_event: OnEvent = lambda event: None) -> ShardManifest:
    """Tokenize all sources into shards, go on where a killed call stopped, or find it done.

    Args:
        data: Sources, policies, tokenizer and split; `output_dir` or `prepared_dir` is set.
        on_event: Takes lines of progress, and counts after every finished split.

    Returns:
        The manifest of the prepared directory, which stands in `output_dir` under its fingerprint.

    Raises:
        ConfigError: The config names no directory, or a filter that cannot be had here where there
            is anything to make.
        DataError: The source is unusable, a split would be empty, or a directory that is already
            there does not match the config. Finished splits stay, without a manifest: the next
            call goes on from there.
        LaunchError: The Ray cluster cannot be reached.
    """
    sources = build_sources(data)
    stage(data)
    if data.prepared_dir is not None:
        return _use_prepared(data, data.prepared_dir, sources, on_event)
    if data.output_dir is None:
        raise ConfigError("data.output_dir is not set: name a directory for the prepared shards")
    recipe = plan_recipe(data, sources)
    directory = data.output_dir / fingerprint(recipe)
    if not (directory / MANIFEST_NAME).exists():
        check_filters(data.clean)
        with _alone(directory, on_event):
            if not (directory / MANIFEST_NAME).exists():
                return Preparation(data, recipe, directory, on_event).run()
    return _reuse(data, directory, recipe, on_event)


def _reuse(
    data: DataConfig, directory: Path, recipe: dict[str, Any], on_event: OnEvent
) -> ShardManifest:
    manifest = load_manifest(directory)
    if manifest.fingerprint != fingerprint(recipe) or manifest.recipe != recipe:
        differences = list_differences(manifest.recipe, recipe)
        raise DataError(
            f"{directory} was made from something else ({differences}); delete it and prepare again"
        )
    _check_quarantine(data, manifest)
    for name in get_args(SplitName):
        ShardSet(manifest, name)
    if (directory / WORK_DIR).exists():
        # The call that wrote the manifest was killed before it could clear up.
        with _alone(directory, on_event):
            close_ledger(directory)
    say(on_event, f"reusing {summarise(manifest)}")
    return manifest


def _use_prepared(
    data: DataConfig, directory: Path, sources: dict[str, Source], on_event: OnEvent
) -> ShardManifest:
    manifest = load_manifest(directory)
    # Shards are used as they are, also where the libraries that cleaned are newer, or not there.
    versions = manifest.recipe.get("clean", {}).get("versions", {})
    try:
        recipe = plan_recipe(data, sources, versions)
    except DataError as exc:
        # Shards outlive their source: a run may resume where the text has never been.
        say(on_event, f"the text of {directory} is not compared: {exc}")
        recipe = {**plan_options(data, versions), "contents": manifest.recipe["contents"]}
    if manifest.recipe != recipe:
        differences = list_differences(manifest.recipe, recipe)
        raise DataError(
            f"data.prepared_dir={directory} was not made from this config ({differences}); "
            "remove data.prepared_dir to prepare again"
        )
    _check_quarantine(data, manifest)
    return manifest


def _check_quarantine(data: DataConfig, manifest: ShardManifest) -> None:
    """Refuse shards without the bad input of their source where bad input is to fail."""
    if data.on_bad_input == "fail" and (manifest.quarantined_documents or manifest.bad_files):
        raise DataError(
            f"{manifest.directory} was prepared without bad input of its source "
            f"({manifest.quarantined_documents}, {len(manifest.bad_files)} files); accept that by "
            "data.on_bad_input=quarantine, or mend the source"
        )


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
