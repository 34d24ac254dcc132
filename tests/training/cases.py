"""Small runs, models and batches that the tests of training share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.batching import BatchPlan, plan_batches
from pipeline.config.load import dump_yaml
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenBatch, label_bytes
from pipeline.data.shards import (
    ShardManifest,
    ShardRecord,
    SplitName,
    SplitRecord,
    write_manifest,
)
from pipeline.models import build_model
from pipeline.models.documents import DocumentRule
from pipeline.models.execution import set_execution
from pipeline.training.distributed import RankContext
from pipeline.training.engine import Engine, build_engine

VOCAB_SIZE = 61
"""Odd, so that no tensor of the embedding's size divides by two ranks."""
TOKEN_BYTES = np.append(np.int32(0), np.arange(1, VOCAB_SIZE, dtype=np.int32) % 5 + 1)
"""Id k stands for k mod 5 + 1 bytes; id 0 ends a document and stands for none."""
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {
        "family": "gpt", "width": 33, "depth": 2, "heads": 3, "norm": "layernorm",
        "positions": "learned", "max_positions": 17,
    },
    "lstm_attention": {"family": "lstm_attention", "width": 32, "depth": 2, "heads": 2},
}  # fmt: skip
GLOBAL_BATCH_SAMPLES = 8
SEQUENCE_TOKENS = 16


def skip_without_bf16(family: str, precision: str) -> None:
    """Skip a test that this CPU cannot run; on one that can, a refusal is a failure."""
    if family == "gpt" or precision == "fp32" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    pytest.skip("this CPU has no bf16 instructions, which nn.LSTM needs")


def small_run(family: str = "gpt", stage: int = 0, **fields: Any) -> RunConfig:
    train = {
        "global_batch_tokens": GLOBAL_BATCH_SAMPLES * SEQUENCE_TOKENS,
        "sequence_tokens": SEQUENCE_TOKENS,
        "micro_batch_samples": 2,
        "total_tokens": 20 * GLOBAL_BATCH_SAMPLES * SEQUENCE_TOKENS,
    }
    train |= fields.pop("train", {})
    zero = {"stage": stage, "bucket_elements": 5_000} | fields.pop("zero", {})
    model = MODELS[family] | fields.pop("model", {})
    return RunConfig.model_validate({"model": model, "train": train, "zero": zero, **fields})


def small_engine(
    ranks: RankContext, run: RunConfig, name: str = "deepspeed"
) -> tuple[Engine, BatchPlan]:
    plan = plan_batches(run.train, ranks.world_size)
    rule = DocumentRule(end_of_document_id=0, switches=run.train.documents)
    model = build_model(run.model, VOCAB_SIZE, run.seed, rule)
    set_execution(model, run.train)
    return build_engine(model, run, plan, ranks, name), plan


def global_batch(step: int) -> list[TokenBatch]:
    """Every micro-batch of a step, with ignored labels in some, the same at every world size."""
    generator = np.random.default_rng([7, step])
    micro_batches = []
    for index in range(GLOBAL_BATCH_SAMPLES // 2):
        tokens = generator.integers(0, VOCAB_SIZE, (2, SEQUENCE_TOKENS + 1))
        # Learnable: every second token repeats the one before it.
        tokens[:, 1::2] = tokens[:, 0:-1:2]
        labels = tokens[:, 1:].copy()
        if index == step % 3:
            labels[:, -1 - 2 * index :] = -100
        micro_batches.append(
            TokenBatch(
                inputs=tokens[:, :-1].copy(), labels=labels,
                text_bytes=label_bytes(labels, TOKEN_BYTES), sample_ids=np.arange(2) + 2 * index,
            )
        )  # fmt: skip
    return micro_batches


def my_batches(ranks: RankContext, step: int) -> list[TokenBatch]:
    return global_batch(step)[ranks.rank :: ranks.world_size]


def write_prepared(
    directory: Path,
    train_tokens: int | dict[str, int] = 6000,
    validation_tokens: int = 410,
) -> Path:
    """Write shards of a learnable text: runs of ids that rise by one, in documents of 40 tokens.

    `train_tokens` may name several sources, each of which gets a shard.
    """
    directory.mkdir(parents=True)
    generator = np.random.default_rng(5)
    if isinstance(train_tokens, int):
        train_tokens = {"made": train_tokens}
    splits: dict[SplitName, SplitRecord] = {}
    sizes: dict[SplitName, dict[str, int]] = {
        "train": train_tokens, "validation": {"made": validation_tokens},
    }  # fmt: skip
    for split, sources in sizes.items():
        shards = [
            write_shard_file(directory, f"{split}-{index:05d}", source, num_tokens, generator)
            for index, (source, num_tokens) in enumerate(sources.items())
        ]
        splits[split] = SplitRecord(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            shards=shards,
        )
    np.save(directory / "token_bytes.npy", TOKEN_BYTES)
    write_manifest(
        ShardManifest(
            fingerprint="f" * 16, recipe={}, vocab_size=VOCAB_SIZE, dtype="uint16",
            end_of_document="<|endoftext|>", end_of_document_id=0, tokenizer_sha256="0" * 64,
            token_bytes_sha256="0" * 64, encoder="tokenizers", encoder_version="0", splits=splits,
            input_documents=0, dropped_documents={}, quarantined_documents={}, bad_files=[],
            directory=directory,
        )
    )  # fmt: skip
    return directory


def write_shard_file(
    directory: Path, name: str, source: str, num_tokens: int, generator: np.random.Generator
) -> ShardRecord:
    tokens = np.add.outer(generator.integers(0, VOCAB_SIZE, num_tokens // 40 + 1), range(40))
    tokens = tokens % (VOCAB_SIZE - 1) + 1
    tokens[:, -1] = 0
    (directory / f"{name}.bin").write_bytes(tokens.astype("<u2").tobytes()[: 2 * num_tokens])
    return ShardRecord(
        name=name, sha256="0" * 64, index_sha256="0" * 64, tokens=num_tokens,
        documents=num_tokens // 40, text_bytes=3 * num_tokens,
        largest_id=VOCAB_SIZE - 1, source=source, encoder="tokenizers", ranges=[],
    )  # fmt: skip


def write_run(run_dir: Path, prepared_dir: Path, run: RunConfig) -> Path:
    run_dir.mkdir(parents=True)
    data = run.data.model_copy(update={"prepared_dir": prepared_dir, "output_dir": prepared_dir})
    (run_dir / "run.yaml").write_text(dump_yaml(run.model_copy(update={"data": data})))
    return run_dir
