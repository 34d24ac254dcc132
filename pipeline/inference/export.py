"""From a model to a directory that `transformers` loads: weights, config and tokenizer.

A GPT whose options Llama or GPT-2 have exactly becomes one of them; any other model is exported
with its own sources beside it, which `trust_remote_code=True` runs.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.config.gpt import GptConfig
from pipeline.config.model import ModelConfig
from pipeline.data.shards import TOKENIZER_NAME
from pipeline.errors import CheckpointError, ConfigError
from pipeline.inference.own_sources import flat_sources
from pipeline.inference.text import TextCodec
from pipeline.inference.transformers_config import obstacles, to_config
from pipeline.inference.transformers_names import Architecture, rules, to_transformers
from pipeline.inference.weights import LoadedModel
from pipeline.models.base import LanguageModel

ExportFormat = Literal["auto", "llama", "gpt2", "tandem"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "gpt2")
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
MODULE = "modeling_tandem"


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What will be written."""

    format: Literal["llama", "gpt2", "tandem"]
    reasons: tuple[str, ...]
    """Why it is neither Llama nor GPT-2; empty if it is."""


def plan_export(config: ModelConfig, wanted: ExportFormat) -> ExportPlan:
    """Decide the format of an export.

    Args:
        config: Of the model.
        wanted: auto takes Llama or GPT-2 where they are exact, and our own module elsewhere.

    Raises:
        ConfigError: The wanted architecture cannot express the config; its fields are named.
    """
    reasons = {}
    for architecture in ARCHITECTURES:
        if isinstance(config, GptConfig):
            reasons[architecture] = obstacles(architecture, config)
        else:
            reasons[architecture] = [f"model.family={config.family} (legal: gpt)"]
    if wanted == "tandem":
        return ExportPlan(format="tandem", reasons=())
    for architecture in ARCHITECTURES:
        if wanted in ("auto", architecture) and not reasons[architecture]:
            return ExportPlan(format=architecture, reasons=())
    if wanted == "auto":
        texts = [f"not {name}: {'; '.join(found)}" for name, found in reasons.items()]
        return ExportPlan(format="tandem", reasons=tuple(texts))
    raise ConfigError(
        f"this model is no {wanted}: {'; '.join(reasons[wanted])}. --format tandem exports it with "
        "its own sources"
    )


def export_model(loaded: LoadedModel, config: ModelConfig, plan: ExportPlan, target: Path) -> None:
    """Write the directory, whole or not at all.

    Args:
        loaded: Model and tokenizer.
        config: Of the model.
        plan: From `plan_export`.
        target: The new directory.

    Raises:
        ConfigError: The directory exists and holds something.
        CheckpointError: It cannot be written.
    """
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            _write(loaded, config, plan, temporary)
            temporary.chmod(0o755)
            if target.exists():
                target.rmdir()
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"cannot write {target}: {exc}") from exc


def check_target(target: Path) -> None:
    """Refuse a directory that holds something.

    Raises:
        ConfigError: It does.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty; name another with --output")


def _write(loaded: LoadedModel, config: ModelConfig, plan: ExportPlan, directory: Path) -> None:
    model, codec = loaded.model, loaded.codec
    tree = export_config(config, plan, model, codec)
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    if plan.format == "tandem":
        for name, text in flat_sources(f"inference.{MODULE}").items():
            (directory / name).write_text(text, encoding="utf-8")
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    elif isinstance(config, GptConfig):
        tensors = to_transformers(tensors, rules(plan.format, config))
    save_file(tensors, str(directory / WEIGHTS_NAME), metadata={"format": "pt"})
    end_id = codec.facts.end_of_document_id
    _write_json(directory / CONFIG_NAME, tree)
    generation: dict[str, Any] = {"bos_token_id": end_id, "eos_token_id": end_id}
    if plan.format == "tandem":
        generation["use_cache"] = False
    padding = range(codec.facts.vocab_size, model.embedding_VD.shape[0])
    if padding:
        # Rows that no token has can be drawn there. Cut off, they would leave the softmax too,
        # and the likelihoods would not be those of training.
        generation["suppress_tokens"] = list(padding)
    _write_json(directory / "generation_config.json", generation)
    _write_json(directory / "tokenizer_config.json", tokenizer_config(codec, config.max_positions))
    (directory / TOKENIZER_NAME).write_text(exported_tokenizer(codec), encoding="utf-8")


def export_config(
    config: ModelConfig, plan: ExportPlan, model: LanguageModel, codec: TextCodec
) -> dict[str, Any]:
    """Give the fields of config.json."""
    vocab_rows, end_id = model.embedding_VD.shape[0], codec.facts.end_of_document_id
    tree: dict[str, Any] = {"dtype": "float32", "bos_token_id": end_id, "eos_token_id": end_id}
    if plan.format != "tandem" and isinstance(config, GptConfig):
        return tree | to_config(plan.format, config, vocab_rows)
    return tree | {
        "architectures": ["TandemForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.TandemConfig",
            "AutoModelForCausalLM": f"{MODULE}.TandemForCausalLM",
        },
        "model_type": "tandem",
        "vocab_size": vocab_rows,
        "max_position_embeddings": config.max_positions,
        # The tie is inside our model, which has one parameter for both.
        "tie_word_embeddings": False,
        "use_cache": False,
        "tandem": config.model_dump(mode="json"),
    }


def tokenizer_config(codec: TextCodec, max_positions: int) -> dict[str, Any]:
    """Give the fields of tokenizer_config.json: text is encoded as `prepare` encodes it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": codec.end_of_document,
        "eos_token": codec.end_of_document,
        "pad_token": codec.end_of_document,
        "padding_side": "right",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not codec.facts.special_tokens_in_text,
    }


def exported_tokenizer(codec: TextCodec) -> str:
    """Give the text of tokenizer.json, without the step that adds tokens around a text.

    `prepare` leaves that step out, so a model has never seen what it adds.
    """
    tree: dict[str, Any] = json.loads(codec.facts.tokenizer_json)
    return json.dumps(tree | {"post_processor": None}, ensure_ascii=False)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
