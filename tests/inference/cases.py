"""Run directories with random weights and a real tokenizer, made without training."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.data import TokenizerConfig
from pipeline.config.load import dump_yaml, lineage_hash
from pipeline.config.schema import RunConfig
from pipeline.data.shards import ShardManifest, ShardRecord, SplitName, SplitRecord, write_manifest
from pipeline.data.tokenizer import TokenizerFacts, train_tokenizer
from pipeline.inference.text import TextCodec
from pipeline.models.base import LanguageModel
from pipeline.training import checkpoint_files
from pipeline.training.checkpoint_store import LocalStore
from pipeline.training.checkpoint_tensors import write_tensors
from pipeline.training.train import build_run_model

TEXTS = (
    "The old river runs past the dark stone. 日本語 and naïve café, emoji 😀 too.",
    "A new moon falls on the river; the sun is old, the light is new.",
    "Stone, river, moon: <|endoftext|> is text here, not an end.",
)
END = "<|endoftext|>"
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"family": "gpt", "width": 32, "depth": 2, "heads": 4, "max_positions": 64},
    "lstm_attention": {
        "family": "lstm_attention", "width": 32, "depth": 2, "heads": 2, "max_positions": 64,
    },
}  # fmt: skip
FINGERPRINT = "a" * 16


def tiny_tokenizer() -> TokenizerFacts:
    return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=290))


def make_shards(directory: Path, facts: TokenizerFacts) -> ShardManifest:
    """Write shards of the texts, by hand: both splits hold all of them."""
    directory.mkdir(parents=True)
    codec = TextCodec(facts, END)
    tokens = [i for text in TEXTS for i in (*codec.encode(text), facts.end_of_document_id)]
    splits: dict[SplitName, SplitRecord] = {}
    names: tuple[SplitName, ...] = ("train", "validation")
    for name in names:
        (directory / f"{name}-00000.bin").write_bytes(np.array(tokens, "<u2").tobytes())
        shard = ShardRecord(
            name=f"{name}-00000", sha256="0" * 64, index_sha256="0" * 64, tokens=len(tokens),
            documents=len(TEXTS), text_bytes=sum(len(text.encode()) for text in TEXTS),
            largest_id=max(tokens), source="made", encoder="tokenizers", ranges=[],
        )  # fmt: skip
        splits[name] = SplitRecord(
            tokens=shard.tokens, documents=shard.documents, text_bytes=shard.text_bytes,
            shards=[shard],
        )  # fmt: skip
    (directory / "tokenizer.json").write_text(facts.tokenizer_json)
    np.save(directory / "token_bytes.npy", facts.token_bytes)
    manifest = ShardManifest(
        fingerprint=FINGERPRINT, recipe={}, vocab_size=facts.vocab_size, dtype="uint16",
        end_of_document=END, end_of_document_id=facts.end_of_document_id,
        tokenizer_sha256=hashlib.sha256(facts.tokenizer_json.encode()).hexdigest(),
        token_bytes_sha256="0" * 64, encoder="tokenizers", encoder_version="0", splits=splits,
        input_documents=len(TEXTS), dropped_documents={}, quarantined_documents={}, bad_files=[],
        directory=directory,
    )  # fmt: skip
    write_manifest(manifest)
    return manifest


def make_run(
    root: Path, model: dict[str, Any], steps: tuple[int, ...] = (1, 2)
) -> tuple[Path, LanguageModel]:
    """Write a run directory with a checkpoint at each step, and give the newest one's model."""
    shards = make_shards(root / "shards", tiny_tokenizer())
    run = RunConfig.model_validate(
        {
            "name": "made",
            "output_dir": root,
            "data": {"prepared_dir": shards.directory, "output_dir": root},
            "model": model,
            "train": {
                "sequence_tokens": 16, "micro_batch_samples": 2, "global_batch_tokens": 32,
                "total_tokens": 64,
            },
        }
    )  # fmt: skip
    run_dir = root / "run"
    run_dir.mkdir()
    (run_dir / "run.yaml").write_text(dump_yaml(run))
    for step in steps:
        newest = build_run_model(run.model_copy(update={"seed": step}), shards)
        spread_logits(newest)
        write_checkpoint(run_dir, run, newest, step)
    return run_dir, newest.eval()


def spread_logits(model: LanguageModel) -> None:
    """Undo the small start of the logits, so that tokens differ in likelihood as after training."""
    model.final_norm.weight.data.fill_(8.0)


def write_checkpoint(run_dir: Path, run: RunConfig, model: LanguageModel, step: int) -> Path:
    directory = run_dir / checkpoint_files.DIRECTORY / checkpoint_files.checkpoint_name(step)
    directory.mkdir(parents=True)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    files = write_tensors(
        LocalStore(directory),
        {f"weights-{n}.safetensors": ("weights", half) for n, half in enumerate(halves)},
    )
    manifest = checkpoint_files.CheckpointManifest(
        step=step, tokens=0, optimizer_step=step, samples=0, skipped_total=0, skipped_in_a_row=0,
        config_hash=lineage_hash(run), data_fingerprint=FINGERPRINT, family=run.model.family,
        zero_stage=0, world_size=2, attempt=1, random_states=[], files=files, code_hash="0" * 64,
        owner="00000001-00000000",
    )  # fmt: skip
    checkpoint_files.write_manifest(LocalStore(directory.parent), directory.name, manifest)
    return directory


def rewrite_manifest(checkpoint: Path, **fields: Any) -> None:
    """Change fields of a manifest, with a digest that fits."""
    manifest = checkpoint_files.read_manifest(checkpoint).model_copy(update=fields)
    checkpoint_files.write_manifest(LocalStore(checkpoint.parent), checkpoint.name, manifest)


def header_bytes(header: dict[str, Any], num_data_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_data_bytes)
