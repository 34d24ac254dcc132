"""From an exported directory, or a Llama or GPT-2 of `transformers`, to a model of ours."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from pipeline.config.model import ModelConfig
from pipeline.data.shards import TOKENIZER_NAME
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import CheckpointError
from pipeline.inference.export import CONFIG_NAME
from pipeline.inference.tensor_files import (
    TensorEntry,
    TensorReader,
    check_entries,
    fill_parameters,
    read_headers,
)
from pipeline.inference.text import TextCodec
from pipeline.inference.transformers_config import from_config, require_counts
from pipeline.inference.transformers_names import from_transformers, rules, their_shapes
from pipeline.inference.weights import LoadedModel
from pipeline.models import build_model
from pipeline.models.base import LanguageModel

MAX_JSON_BYTES = 1 << 20
"""Largest config.json that is read; they have a few kilobytes."""


def is_export(path: Path) -> bool:
    """Tell whether a directory holds an exported model."""
    return (path / CONFIG_NAME).is_file() and any(path.glob("*.safetensors"))


def load_export(directory: Path, device: torch.device | None = None) -> LoadedModel:
    """Load a model and its tokenizer; runs none of the sources that stand in the directory.

    Args:
        directory: From `export_model`, or a Llama or GPT-2 that `transformers` saved.
        device: Where to put the weights; None keeps them on the CPU.

    Raises:
        CheckpointError: A file is missing or damaged, the model is none that we can build, or its
            tokenizer gives ids that it has no row for.
        DataError: The tokenizer cannot be used.
    """
    model, codec = load_exported_model(directory), _load_codec(directory)
    rows = model.embedding_VD.shape[0]
    if codec.facts.vocab_size > rows:
        raise CheckpointError(
            f"{directory / TOKENIZER_NAME} has ids up to {codec.facts.vocab_size - 1}, so it needs "
            f"{codec.facts.vocab_size} rows; {directory / CONFIG_NAME} says vocab_size={rows}. "
            "Take the tokenizer that the model was trained with"
        )
    return LoadedModel(model=model.to(device or torch.device("cpu")).eval(), codec=codec)


def load_exported_model(directory: Path) -> LanguageModel:
    """Load the model alone, without a tokenizer.

    Raises:
        CheckpointError: As `load_export`.
    """
    origin = directory / CONFIG_NAME
    tree = _read_json(origin)
    entries = read_headers(sorted(directory.glob("*.safetensors")))
    if tree.get("model_type") == "tandem":
        try:
            require_counts(tree, ("vocab_size",), str(origin))
            config: ModelConfig = TypeAdapter(ModelConfig).validate_python(tree["tandem"])
            _check_size(config, tree["vocab_size"], entries, origin)
            model = build_model(config, tree["vocab_size"], seed=0)
        except (ValidationError, KeyError) as exc:
            raise CheckpointError(f"{origin} describes no model of this version: {exc}") from exc
        shapes = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters()}
        check_entries(entries, shapes, str(directory))
        tensors = TensorReader(entries)
        fill_parameters(
            model, {name: tensors[f"model.{name}"] for name, _ in model.named_parameters()}
        )
        return model
    architecture, gpt = from_config(tree, str(origin))
    _check_size(gpt, tree["vocab_size"], entries, origin)
    model = build_model(gpt, tree["vocab_size"], seed=0)
    mapping = rules(architecture, gpt)
    shapes = their_shapes({n: tuple(p.shape) for n, p in model.named_parameters()}, mapping)
    check_entries(entries, shapes, str(directory))
    fill_parameters(model, from_transformers(TensorReader(entries), mapping))
    return model


def _check_size(
    config: ModelConfig, vocab_size: int, entries: Mapping[str, TensorEntry], origin: Path
) -> None:
    """Refuse a config of far more parameters than are stored, before memory is taken for them.

    Smaller differences are named by tensor once the model is there to compare with.
    """
    needed = config.num_parameters(vocab_size).total
    stored = sum(prod(entry.shape) for entry in entries.values())
    if needed > 2 * stored:
        raise CheckpointError(
            f"{origin} describes a model of {needed:,} parameters, and the safetensors files "
            f"beside it hold {stored:,}; take the config that was written with them"
        )


def _load_codec(directory: Path) -> TextCodec:
    path = directory / "tokenizer_config.json"
    tree = _read_json(path)
    end = tree.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if not isinstance(end, str):
        raise CheckpointError(f"{path} names no eos_token, which closes documents")
    in_text = not tree.get("split_special_tokens", False)
    facts = load_tokenizer(directory / TOKENIZER_NAME, end, special_tokens_in_text=in_text)
    return TextCodec(facts, end)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        tree = json.loads(data) if len(data) <= MAX_JSON_BYTES else None
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"{path} is no JSON object of at most {MAX_JSON_BYTES} bytes, as a config is"
        )
    return tree
