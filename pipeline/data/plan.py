"""From a data config to the recipe that decides every token id, and to its fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.data import CleanConfig, DataConfig, SourceConfig
from pipeline.data.filters import filter_versions
from pipeline.data.sources import Source
from pipeline.data.storage import file_sha256

FORMAT_VERSION = 3
"""Raised whenever the same recipe would give other shards."""
SOURCE_OPTIONS = {
    "embedded": (),
    "jsonl": ("text_column", "id_column"),
    "parquet": ("text_column", "id_column"),
    "text": ("document", "document_bytes"),
    "huggingface": ("text_column", "id_column", "split", "subset"),
    "synthetic": ("synthetic",),
}
"""The fields of a source that each kind looks at; the path does not count, the contents do."""


def plan_recipe(
    data: DataConfig, sources: Mapping[str, Source], versions: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Give everything that decides the token ids: sources and contents, cleaning, tokenizer, split.

    The mixture is not part of it, nor what happens at bad input: shards with quarantined input say
    so themselves.

    Args:
        data: The config.
        sources: Its sources.
        versions: As `plan_options` takes them.

    Raises:
        ConfigError: As `plan_options`.
        DataError: A source or the tokenizer file is missing.
    """
    options = plan_options(data, versions)
    return {**options, "contents": {name: source.contents() for name, source in sources.items()}}


def plan_options(data: DataConfig, versions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Give the part of the recipe that the config tells by itself.

    Args:
        data: The config.
        versions: Of the libraries that cleaned, where that has been done; None takes those that
            would do it here.

    Raises:
        ConfigError: `versions` is None, and a filter is unknown or its library is not installed.
        DataError: The tokenizer file is missing.
    """
    tokenizer: dict[str, Any] = {
        "end_of_document": data.tokenizer.end_of_document,
        "special_tokens_in_text": data.tokenizer.special_tokens_in_text,
    }
    if data.tokenizer.path is None:
        tokenizer["vocab_size"] = data.tokenizer.vocab_size
    else:
        tokenizer["sha256"] = file_sha256(Path(data.tokenizer.path).expanduser())
    return {
        "format_version": FORMAT_VERSION,
        "sources": {name: _options(source) for name, source in data.named_sources.items()},
        "clean": _plan_cleaning(data.clean, versions),
        "tokenizer": tokenizer,
        "validation_fraction": data.validation_fraction,
        "max_document_bytes": data.max_document_bytes,
    }


def fingerprint(recipe: dict[str, Any]) -> str:
    """Give 16 hex digits of the recipe's sha256."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _options(config: SourceConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    return {"kind": config.kind, **{name: tree[name] for name in SOURCE_OPTIONS[config.kind]}}


def _plan_cleaning(clean: CleanConfig, versions: Mapping[str, str] | None) -> dict[str, Any]:
    plan: dict[str, Any] = {"deduplicate": clean.deduplicate}
    if clean.deduplicate == "minhash":
        plan["minhash"] = clean.minhash.model_dump()
    if clean.filters:
        plan |= {"filters": list(clean.filters), "options": clean.options}
    if decisive := filter_versions(clean) if versions is None else versions:
        plan["versions"] = dict(decisive)
    if clean.keep_dropped:
        plan["keep_dropped"] = True
    return plan
