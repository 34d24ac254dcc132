"""Small corpora, prepared directories made without Ray, and one local Ray for the whole session."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import zstandard

import pipeline
from pipeline.config.data import DataConfig, SourceConfig, TokenizerConfig
from pipeline.data.assembly import npy_bytes
from pipeline.data.ray_surroundings import environment_set
from pipeline.data.ray_tasks import ray_session
from pipeline.data.shard_writer import write_shard
from pipeline.data.shards import (
    ShardManifest,
    SourceRange,
    SplitRecord,
    write_atomic,
    write_manifest,
)

WORDS = (
    "ship",
    "sea",
    "Holmes",
    "garden",
    "na\u00efve",
    "\u4f60\u597d",
    "said",
    "\U0001f44d",
    "the",
)


@pytest.fixture(scope="session")
def local_ray(s3_variables: dict[str, str]) -> Iterator[None]:
    # Workers have the environment in which their Ray was started.
    with environment_set(s3_variables), ray_session(num_cpus=2):
        yield


@pytest.fixture(scope="session")
def make_documents() -> Callable[[int], list[dict[str, str]]]:
    """Give n different documents of some 200 words."""

    def make(num_documents: int) -> list[dict[str, str]]:
        generator = np.random.default_rng(7)
        return [
            {"id": f"d{i}", "text": f"{i}: " + " ".join(generator.choice(WORDS, 200))}
            for i in range(num_documents)
        ]

    return make


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Sequence[Any]], Path]:
    """Write records, or raw lines given as text; `.gz` and `.zst` names are compressed."""

    def write(path: Path, records: Sequence[Any]) -> Path:
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
        data = "".join(line + "\n" for line in lines).encode()
        if path.suffix == ".gz":
            data = gzip.compress(data)
        if path.suffix == ".zst":
            data = zstandard.compress(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write


@pytest.fixture(scope="session")
def make_config() -> Callable[..., DataConfig]:
    """Give a config that reads `path` and prepares into `output_dir`."""

    def make(path: Path, output_dir: Path, **fields: Any) -> DataConfig:
        source = {"kind": "jsonl", "path": str(path), **fields.pop("source", {})}
        return DataConfig(
            source=SourceConfig(**source),
            tokenizer=TokenizerConfig(**{"vocab_size": 300, **fields.pop("tokenizer", {})}),
            output_dir=output_dir,
            **{"validation_fraction": 0.2, **fields},
        )

    return make


@pytest.fixture
def run_without_clean(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run a script where the packages of the `clean` extra are not installed."""
    packages = tmp_path_factory.mktemp("packages")
    for package in Path(pydantic.__file__).parents[1].iterdir():
        if not package.name.startswith(("datatrove", "rensa", "spacy")):
            (packages / package.name).symlink_to(package)
    root = Path(pipeline.__file__).parents[1]

    def run(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", "-c", script],
            env={"PYTHONPATH": f"{root}:{packages}"},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def make_prepared(tmp_path: Path) -> Callable[..., ShardManifest]:
    """Write a prepared directory whose documents are lists of token ids, one list a shard.

    `sources` names the source of each shard.
    """

    def make(
        train: Sequence[Sequence[Sequence[int]]],
        validation: Sequence[Sequence[Sequence[int]]] = (),
        vocab_size: int = 1000,
        dtype: str = "uint16",
        sources: Sequence[str] = (),
    ) -> ShardManifest:
        token_bytes = np.ones(vocab_size, dtype=np.int32)
        write_atomic(tmp_path / "tokenizer.json", b"{}")
        write_atomic(tmp_path / "token_bytes.npy", npy_bytes(token_bytes))
        manifest = ShardManifest(
            fingerprint="0" * 16,
            recipe={},
            vocab_size=vocab_size,
            dtype=dtype,
            end_of_document="<|endoftext|>",
            end_of_document_id=0,
            tokenizer_sha256=sha256(b"{}").hexdigest(),
            token_bytes_sha256=sha256(npy_bytes(token_bytes)).hexdigest(),
            encoder="tokenizers",
            encoder_version="0",
            splits={
                "train": _write_split(tmp_path, "train", train, dtype, sources),
                "validation": _write_split(tmp_path, "validation", validation, dtype, sources),
            },
            input_documents=0,
            dropped_documents={},
            quarantined_documents={},
            bad_files=[],
            directory=tmp_path,
        )
        write_manifest(manifest)
        return manifest

    return make


def _write_split(
    directory: Path,
    name: str,
    shards: Sequence[Sequence[Sequence[int]]],
    dtype: str,
    sources: Sequence[str],
) -> SplitRecord:
    records = []
    for i, documents in enumerate(shards):
        with write_shard(directory, f"{name}-{i:05d}", dtype) as writer:
            lengths = np.array([len(document) for document in documents])
            writer.write(np.concatenate(documents))
            writer.add(lengths, int(lengths.sum()))
            made = SourceRange(name="made", start=0, stop=len(documents))
            source = sources[i] if sources else "made"
            record = writer.finish(source, "tokenizers", [made])
        assert record is not None
        records.append(record)
    return SplitRecord(
        tokens=sum(r.tokens for r in records),
        documents=sum(r.documents for r in records),
        text_bytes=sum(r.text_bytes for r in records),
        shards=records,
    )
