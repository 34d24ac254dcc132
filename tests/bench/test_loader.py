"""How many tokens one core reads: `python -m pytest -m bench -s tests/bench/test_loader.py`.

The loader has one thread, so a second of its CPU time is a second of one core, others aside.
"""

import time

import numpy as np
import pytest

from pipeline.config.batching import BatchPlan
from pipeline.config.data import MixtureConfig
from pipeline.data.loader import TokenLoader
from pipeline.data.shards import ShardManifest, ShardRecord, SplitRecord

pytestmark = pytest.mark.bench
T = 1024
VOCAB_SIZE = 50_257
SHARD_TOKENS = 8_000_000
SOURCES = ("code", "web", "books", "web")
NUM_ROUNDS, ROUND_TOKENS = 15, 8 << 20


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> ShardManifest:
    """Four shards of 8 million random ids each, 64 MB, in the page cache as they were written."""
    directory = tmp_path_factory.mktemp("bench")
    generator = np.random.default_rng(0)
    shards = []
    for index, source in enumerate(SOURCES):
        name = f"train-{index:05d}"
        ids = generator.integers(0, VOCAB_SIZE, SHARD_TOKENS, dtype=np.uint16)
        ids.astype("<u2").tofile(directory / f"{name}.bin")
        shards.append(
            ShardRecord(
                name=name,
                sha256="",
                index_sha256="",
                tokens=SHARD_TOKENS,
                documents=1,
                text_bytes=1,
                largest_id=VOCAB_SIZE - 1,
                source=source,
                encoder="",
                ranges=[],
            )  # fmt: skip
        )
    np.save(directory / "token_bytes.npy", np.ones(VOCAB_SIZE, dtype=np.int32))
    split = SplitRecord(tokens=SHARD_TOKENS * len(shards), documents=4, text_bytes=4, shards=shards)
    return ShardManifest(
        fingerprint="", recipe={}, vocab_size=VOCAB_SIZE, dtype="uint16", end_of_document="",
        end_of_document_id=0, tokenizer_sha256="", token_bytes_sha256="", encoder="",
        encoder_version="", splits={"train": split}, dropped_documents={},
        input_documents=4, quarantined_documents={}, bad_files=[], directory=directory,
    )  # fmt: skip


@pytest.mark.parametrize("micro_batch_samples", [8, 64])
@pytest.mark.parametrize(
    "mixture", [MixtureConfig(), MixtureConfig(weights={"code": 0.2, "web": 0.5, "books": 0.3})]
)
def test_one_core_reads_20_million_tokens_a_second(
    manifest: ShardManifest, mixture: MixtureConfig, micro_batch_samples: int
) -> None:
    plan = BatchPlan(
        world_size=1, micro_batch_samples=micro_batch_samples, accumulation_steps=1,
        sequence_tokens=T,
    )  # fmt: skip
    loader = TokenLoader(manifest, mixture, plan, rank=0, seed=0)
    steps = ROUND_TOKENS // (micro_batch_samples * T)
    rates = []
    for _ in range(NUM_ROUNDS + 1):
        begin = time.process_time()
        for _ in range(steps):
            loader.next_step()
        rates.append(ROUND_TOKENS / (time.process_time() - begin) / 1e6)
    low, median, high = np.percentile(rates[1:], [25, 50, 75])
    kind = "by weight" if mixture.weights else "by size"
    print(
        f"\nmicro-batch {micro_batch_samples:>2}, 3 sources {kind:>9}: median {median:.0f} million "
        f"tokens a CPU second, quartiles {low:.0f} to {high:.0f}; {NUM_ROUNDS} rounds of "
        f"{ROUND_TOKENS:,} tokens after a first one"
    )
    assert median > 20.0
