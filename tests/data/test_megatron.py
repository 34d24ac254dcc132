"""Prepared shards as Megatron sees them: by its published byte layout, and by its own reader.

The layout is that of `megatron/core/datasets/indexed_dataset.py`. That the bytes equal those which
its `tools/preprocess_data.py` writes from the same documents is checked beside the speed of both,
in `tests/bench/tokenize_peers.py`.
"""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from pipeline.config.data import DataConfig
from pipeline.data.prepare import prepare
from pipeline.data.shards import ShardManifest, SplitName

VALIDATION_FRACTION = 0.2
HEADER = "<9sQBQQ"
"""Magic, version, dtype code, number of sequences, length of the document starts."""
CODES = {"uint16": (8, "<u2"), "int32": (4, "<i4")}
"""Megatron's code for a dtype, and the dtype on disk."""

READ_WITH_MEGATRON = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset

shards = {}
for prefix in sys.argv[1:]:
    dataset = IndexedDataset(prefix)
    shards[prefix] = {
        "dtype": dataset.index.dtype.__name__,
        "document_indices": dataset.document_indices.tolist(),
        "sequences": [dataset[i].tolist() for i in range(len(dataset))],
    }
print(json.dumps(shards))
"""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Shards, and the documents they have to hold by split, closed."""

    manifest: ShardManifest
    documents: dict[str, list[str]]
    tokenizer: Tokenizer

    def expected_ids(self, split: str) -> list[list[int]]:
        end = self.manifest.end_of_document_id
        texts = self.documents[split]
        return [[*self.tokenizer.encode(text, add_special_tokens=False).ids, end] for text in texts]


@pytest.fixture(scope="module", params=list(CODES))
def prepared(
    request: pytest.FixtureRequest,
    local_ray: None,
    tmp_path_factory: pytest.TempPathFactory,
    make_documents: Callable[[int], list[dict[str, str]]],
    write_jsonl: Callable[..., Path],
    make_config: Callable[..., DataConfig],
) -> Prepared:
    """Shards of 60 documents in two files, by a vocabulary that fits 16 bits or does not."""
    root = tmp_path_factory.mktemp(request.param)
    documents = make_documents(60)
    write_jsonl(root / "text" / "a.jsonl", documents[:30])
    write_jsonl(root / "text" / "b.jsonl.gz", documents[30:])
    tokenizer: dict[str, Any] = {"vocab_size": 300}
    if request.param == "int32":
        tokenizer = {"path": str(write_large_tokenizer(root / "tokenizer.json", documents))}
    config = make_config(
        root / "text",
        root / "prepared",
        tokenizer=tokenizer,
        validation_fraction=VALIDATION_FRACTION,
    )
    manifest = prepare(config)
    assert manifest.dtype == request.param
    return Prepared(
        manifest=manifest,
        documents={
            "train": [d["text"] for d in documents if not is_held_out(d["id"])],
            "validation": [d["text"] for d in documents if is_held_out(d["id"])],
        },
        tokenizer=Tokenizer.from_file(str(manifest.directory / "tokenizer.json")),
    )


def write_large_tokenizer(path: Path, documents: list[dict[str, str]]) -> Path:
    """Write a tokenizer of whole words whose real ones stand behind 65,500 that never occur."""
    used = sorted({word for document in documents for word in document["text"].split()})
    words = ["<unk>", *(f"unused-{i}" for i in range(65_500)), *used]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(path))
    return path


def is_held_out(document_id: str) -> bool:
    return int(sha256(document_id.encode()).hexdigest()[:12], 16) < VALIDATION_FRACTION * 16**12


def read_by_layout(prefix: Path, dtype: str) -> list[list[int]]:
    """Read an indexed dataset with `struct` and NumPy, and check each of its fields."""
    code, on_disk = CODES[dtype]
    index, tokens = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    magic, version, found_code, num_sequences, num_starts = struct.unpack_from(HEADER, index)
    assert (magic, version, found_code) == (b"MMIDIDX\x00\x00", 1, code)
    assert num_starts == num_sequences + 1
    assert len(index) == 34 + 12 * num_sequences + 8 * num_starts
    lengths = np.frombuffer(index, "<i4", num_sequences, 34).astype(np.int64)
    pointers = np.frombuffer(index, "<i8", num_sequences, 34 + 4 * num_sequences)
    starts = np.frombuffer(index, "<i8", num_starts, 34 + 12 * num_sequences)
    width = np.dtype(on_disk).itemsize
    assert pointers.tolist() == (np.concatenate([[0], lengths.cumsum()])[:-1] * width).tolist()
    assert starts.tolist() == list(range(num_sequences + 1))
    assert len(tokens) == lengths.sum() * width
    return [
        np.frombuffer(tokens, on_disk, length, pointer).tolist()
        for length, pointer in zip(lengths, pointers, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_published_layout_gives_every_document_back(
    prepared: Prepared, split: SplitName
) -> None:
    manifest, found = prepared.manifest, []
    for shard in manifest.splits[split].shards:
        documents = read_by_layout(manifest.directory / shard.name, manifest.dtype)
        assert len(documents) == shard.documents
        assert sum(map(len, documents)) == shard.tokens
        assert max(map(max, documents)) == shard.largest_id < manifest.vocab_size
        found += documents
    assert found == prepared.expected_ids(split)
    decoded = [prepared.tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in found]
    assert decoded == prepared.documents[split]


@pytest.mark.slow
@pytest.mark.bench
@pytest.mark.skipif(find_spec("megatron") is None, reason="needs `pip install megatron-core`")
def test_megatron_reads_the_shards(prepared: Prepared) -> None:
    manifest = prepared.manifest
    prefixes = {
        split: [str(manifest.directory / shard.name) for shard in manifest.splits[split].shards]
        for split in ("train", "validation")
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ_WITH_MEGATRON, *sum(prefixes.values(), [])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shards = json.loads(done.stdout.splitlines()[-1])
    for split, names in prefixes.items():
        found = []
        for name in names:
            assert shards[name]["dtype"] == manifest.dtype
            sequences = shards[name]["sequences"]
            assert shards[name]["document_indices"] == list(range(len(sequences) + 1))
            found += sequences
        assert found == prepared.expected_ids(split)
