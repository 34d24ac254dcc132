"""From a data config to the recipe that decides every token id, and to its fingerprint."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.config.data import DataConfig
from pipeline.data.sources import Source
from pipeline.data.text_files import file_sha256

FORMAT_VERSION = 1
"""Raised whenever the same recipe would give other shards."""
SOURCE_OPTIONS = {
    "embedded": (),
    "parquet": ("text_column", "id_column"),
    "synthetic": ("synthetic",),
    "jsonl": ("text_column", "id_column"),
    "text": ("document_bytes",),
    "huggingface": ("text_column", "id_column", "split"),
}
"""The fields of `data.source` that each kind looks at; the path does not count, the contents do."""


def plan_recipe(data: DataConfig, source: Source) -> dict[str, Any]:
    """Give everything that decides the token ids: source contents and options, tokenizer, split.

    Raises:
        DataError: The source or the tokenizer file is missing.
    """
    return {**plan_options(data), "contents": source.contents()}


def plan_options(data: DataConfig) -> dict[str, Any]:
    """Give the part of the recipe that the config tells by itself.

    Raises:
        DataError: The tokenizer file is missing.
    """
    config = data.source
    tokenizer: dict[str, Any] = {"end_of_document": data.tokenizer.end_of_document}
    if data.tokenizer.path is None:
        tokenizer["vocab_size"] = data.tokenizer.vocab_size
    else:
        tokenizer["sha256"] = file_sha256(Path(data.tokenizer.path).expanduser())
    options = {name: getattr(config, name) for name in SOURCE_OPTIONS[config.kind]}
    return {
        "format_version": FORMAT_VERSION,
        "source": {"kind": config.kind, **options},
        "tokenizer": tokenizer,
        "validation_fraction": data.validation_fraction,
    }


def fingerprint(recipe: dict[str, Any]) -> str:
    """Give 16 hex digits of the recipe's sha256."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
