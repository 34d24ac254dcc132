"""Duplicates: known similarities, chains, published probabilities, brute force, kills, workers."""

import json
import re
import signal
import subprocess
import sys
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import ray
import zstandard

import pipeline
from pipeline.config.data import CleanConfig, MinHashConfig
from pipeline.data.dedup_ray import find_duplicates
from pipeline.data.signatures import (
    FIRST_BAND_ROW,
    band_hashes,
    find_equal,
    join_pairs,
    read_rows,
    shingle_hashes,
    write_signatures,
)
from pipeline.data.sources import Split
from pipeline.errors import DataError

ROOT = Path(pipeline.__file__).parents[1]
EXACT = CleanConfig(deduplicate="exact")
NEAR = CleanConfig(deduplicate="minhash")

Found = dict[int, dict[tuple[int, int], str]]


def words(start: int, stop: int) -> str:
    return " ".join(f"word{i}" for i in range(start, stop))


def make_split(index: int) -> Split:
    return Split(index=index, source="made", pieces=())


def find_in_one_process(texts: Sequence[str], config: CleanConfig, place: Path) -> list[int]:
    """Give the numbers of the duplicates of one split."""
    path = place / "signatures.npy"
    write_signatures((((0, i), text) for i, text in enumerate(texts)), config, path)
    rows = [slice(2, 4)]
    if config.deduplicate == "minhash":
        rows += [slice(4 + i, 5 + i) for i in range(config.minhash.num_bands)]
    pairs = np.concatenate([find_equal([path], row) for row in rows])
    return join_pairs(pairs)[:, 1].tolist()


@lru_cache(maxsize=400)
def shingles(text: str) -> set[tuple[str, ...]]:
    """Give the 5-word shingles by the rules that the module states, in its own way."""
    found = re.findall(r"\w+", unicodedata.normalize("NFC", text.lower()))
    return set(zip(*(found[i:] for i in range(5)), strict=False))


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_equal_bytes_are_the_same_text_and_nothing_else_is(tmp_path: Path) -> None:
    texts = ["a b", "c", "a b", "A b", "a  b", "", "c", "e\u0301", "\u00e9", ""]
    assert find_in_one_process(texts, EXACT, tmp_path) == [2, 6, 9]


def test_case_punctuation_and_whitespace_count_for_nothing_in_near_duplicates(
    tmp_path: Path,
) -> None:
    texts = [
        "The na\u00efve fox, it jumps over 3 dogs!",
        "the NAI\u0308VE fox \u2014 it\n\njumps\tover 3 dogs",
        "the na\u00efve fox it jumps over 4 dogs",
        "the, fox",
        "the fox",
        "the fox",
    ]
    assert find_in_one_process(texts, NEAR, tmp_path) == [1, 5]


def test_the_shingles_of_a_text_are_those_of_a_plain_count() -> None:
    text = "Ein B\u00e4r, zwei B\u00e4ren; x_1 y-2 \u4f60\u597d. " * 3 + words(0, 300_000)
    hashes = shingle_hashes(text, 5)
    assert len(np.unique(hashes)) == len(shingles(text))
    assert len(hashes) == len(re.findall(r"\w+", text)) - 4
    assert shingle_hashes("only four words here", 5).size == 0
    assert shingle_hashes("", 5).size == 0
    order = [shingle_hashes(text, 5)[0] for text in ("a b c d e", "b a c d e", "e d c b a")]
    assert len(set(order)) == 3


def test_a_chain_of_near_duplicates_keeps_its_first_alone(tmp_path: Path) -> None:
    chain = [words(20 * i, 1000 + 20 * i) for i in range(30)]
    assert jaccard(chain[0], chain[1]) > 0.95
    assert jaccard(chain[0], chain[-1]) < 0.3
    others = [words(10_000 * i, 10_000 * i + 1000) for i in range(1, 4)]
    texts = [others[0], chain[7], others[1], *chain[8:], *chain[:7], others[2]]
    expected = [i for i, text in enumerate(texts) if text in chain and i != 1]
    assert find_in_one_process(texts, NEAR, tmp_path) == expected
    alone = find_in_one_process([chain[0], chain[-1]], NEAR, tmp_path)
    assert alone == []


@pytest.mark.parametrize(
    ("shared", "similarity"), [(200, 0.5), (251, 0.7192), (267, 0.8018), (285, 0.9048)]
)
def test_pairs_are_found_as_often_as_the_formula_says(shared: int, similarity: float) -> None:
    """1 - (1 - s^8)^14 (Penedo et al. 2024, section 3.4), within four binomial deviations.

    A pair shares k of 300 shingles each: s = k / (600 - k). Every tenth pair has hash functions of
    its own, since pairs under the same ones are not independent.
    """
    assert shared / (600 - shared) == pytest.approx(similarity, abs=1e-4)
    generator = np.random.default_rng(shared)
    num_pairs, found = 3000, 0
    for seed in range(num_pairs // 10):
        sets = []
        for _ in range(10):
            drawn = generator.integers(0, 2**64, 600 - shared, dtype=np.uint64)
            sets += [drawn[:300], drawn[300 - shared :]]
        bands = band_hashes(sets, MinHashConfig(seed=seed))
        found += int((bands[:, ::2] == bands[:, 1::2]).any(axis=0).sum())
    expected = 1 - (1 - similarity**8) ** 14
    deviation = (expected * (1 - expected) / num_pairs) ** 0.5
    assert found / num_pairs == pytest.approx(expected, abs=4 * deviation + 1 / num_pairs)


@pytest.fixture(scope="module")
def real_texts() -> list[str]:
    """Passages of novels, and 30 more: copies, copies with words changed, parts."""
    corpus = ROOT / "pipeline" / "data" / "corpus" / "classics.jsonl.zst"
    with zstandard.open(corpus, "rt", encoding="utf-8") as stream:
        chapters = [json.loads(line)["text"] for line in stream]
    texts = [text[i : i + 2500] for text in chapters for i in range(0, 10_000, 2500)]
    texts = [text for text in texts if len(text) > 500][:270]
    for i in range(10):
        changed = texts[5 * i].split()
        changed[:: 60 - 5 * i] = ["changed"] * len(changed[:: 60 - 5 * i])
        texts += [texts[7 * i], " ".join(changed), texts[11 * i][: 2300 - 150 * i]]
    order = np.random.default_rng(3).permutation(len(texts))
    return [texts[i] for i in order]


def groups_by_brute_force(texts: Sequence[str], path: Path) -> list[int]:
    """Compare every document with every other, and spread the smallest number along the links."""
    bands = read_rows([path], slice(FIRST_BAND_ROW, None)).T
    labels = list(range(len(texts)))
    links = [
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if texts[i] == texts[j] or (bands[i] == bands[j]).any()
    ]
    for _ in texts:
        for i, j in links:
            labels[i] = labels[j] = min(labels[i], labels[j])
    return [i for i, label in enumerate(labels) if label != i]


def test_real_documents_are_paired_as_all_pairs_compared_are(
    real_texts: list[str], tmp_path: Path
) -> None:
    found = find_in_one_process(real_texts, NEAR, tmp_path)
    assert found == groups_by_brute_force(real_texts, tmp_path / "signatures.npy")
    assert 10 <= len(found) <= 30
    for j in found:
        assert max(jaccard(text, real_texts[j]) for text in real_texts[:j]) > 0.5


def deal(texts: Sequence[str], num_splits: int) -> list[list[tuple[tuple[int, int], str]]]:
    """Deal texts into splits of two pieces each, some of them empty."""
    bounds = np.linspace(0, len(texts), num_splits).astype(int).tolist()
    parts = [texts[i:j] for i, j in zip(bounds, bounds[1:], strict=False)]
    parts.insert(1, [])
    return [[((i % 2, i // 2), text) for i, text in enumerate(part)] for part in parts]


def read_dealt(source: Path) -> Callable[[Split], Iterator[tuple[tuple[int, int], str]]]:
    """Give a reader of dealt texts that notes each split it reads."""

    def read(split: Split) -> Iterator[tuple[tuple[int, int], str]]:
        with (source / "read.txt").open("a") as stream:
            stream.write(f"{split.index}\n")
        lines = json.loads((source / f"{split.index}.json").read_text())
        yield from ((tuple(key), text) for key, text in lines)

    return read


@pytest.fixture
def dealt(real_texts: list[str], tmp_path: Path) -> Path:
    for index, part in enumerate(deal(real_texts, 6)):
        (tmp_path / f"{index}.json").write_text(json.dumps(part))
    return tmp_path


IN_ANOTHER_PROCESS = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from pipeline.config.data import CleanConfig
from pipeline.data.dedup_ray import find_duplicates
from pipeline.data.ray_tasks import ray_session
from pipeline.data.sources import Split

source = Path({source!r})

def read(split):
    for key, text in json.loads((source / f"{{split.index}}.json").read_text()):
        yield tuple(key), text

def on_event(event):
    if event.message.startswith("compared 2/"):
        os.kill(os.getpid(), signal.SIGKILL)

splits = [Split(index=i, source="made", pieces=()) for i in range(6)]
with ray_session({address!r}):
    find_duplicates(
        splits, read, CleanConfig(deduplicate="minhash"), Path({work!r}), on_event
    )
"""


def run_until_killed(source: Path, work: Path, address: str) -> subprocess.CompletedProcess[str]:
    code = IN_ANOTHER_PROCESS.format(
        root=str(ROOT), source=str(source), work=str(work), address=address
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120
    )


def flat(found: Found) -> list[list[object]]:
    return [[i, *key, reason] for i in sorted(found) for key, reason in sorted(found[i].items())]


@pytest.mark.slow
def test_two_workers_or_one_process_in_any_order_leave_the_first_of_each_group(
    local_ray: None, dealt: Path, real_texts: list[str]
) -> None:
    splits = [make_split(i) for i in range(6)]
    two = find_duplicates(splits[::-1], read_dealt(dealt), NEAR, dealt / "two")
    parts = [json.loads((dealt / f"{i}.json").read_text()) for i in range(6)]
    places = [(i, *key) for i, part in enumerate(parts) for key, _ in part]
    assert [text for part in parts for _, text in part] == real_texts
    numbers = find_in_one_process(real_texts, NEAR, dealt)
    assert flat(two) == sorted(
        [*places[n], "duplicate_text" if real_texts[n] in real_texts[:n] else "near_duplicate"]
        for n in numbers
    )
    reasons = {reason for split in two.values() for reason in split.values()}
    assert reasons == {"duplicate_text", "near_duplicate"}

    (dealt / "one").mkdir()
    for split in splits[::-1]:
        path = dealt / "one" / f"signatures-{split.index:05d}.npy"
        write_signatures(read_dealt(dealt)(split), NEAR, path)
    files = {path.name: path.read_bytes() for path in (dealt / "two").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (dealt / "one").iterdir()}


@pytest.mark.slow
def test_a_killed_comparison_goes_on_without_reading_finished_splits_again(
    local_ray: None, dealt: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    killed = run_until_killed(dealt, dealt / "work", address)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = {p.name for p in (dealt / "work").glob("signatures-*")}
    assert len(finished) >= 2
    (dealt / "work" / "signatures-00005.npy").unlink(missing_ok=True)
    splits = [make_split(i) for i in range(6)]
    resumed = find_duplicates(splits, read_dealt(dealt), NEAR, dealt / "work")
    read_again = {f"signatures-{int(i):05d}.npy" for i in (dealt / "read.txt").read_text().split()}
    assert read_again
    assert not read_again & (finished - {"signatures-00005.npy"})
    (dealt / "read.txt").unlink()
    assert resumed == find_duplicates(splits, read_dealt(dealt), NEAR, dealt / "work")
    assert not (dealt / "read.txt").exists()
    assert resumed == find_duplicates(splits, read_dealt(dealt), NEAR, dealt / "afresh")


@pytest.mark.slow
def test_exact_mode_and_an_error_of_the_reader(local_ray: None, dealt: Path) -> None:
    splits = [make_split(i) for i in range(6)]
    exact = find_duplicates(splits, read_dealt(dealt), EXACT, dealt / "work")
    assert {reason for split in exact.values() for reason in split.values()} == {"duplicate_text"}
    assert find_duplicates(splits, read_dealt(dealt), CleanConfig(), dealt / "none") == {}
    assert not (dealt / "none").exists()

    def fail(split: Split) -> Iterator[tuple[tuple[int, int], str]]:
        raise DataError("file.jsonl:7: invalid JSON")

    with pytest.raises(DataError, match=r"^file\.jsonl:7: invalid JSON$"):
        find_duplicates(splits, fail, NEAR, dealt / "failed")
    assert list((dealt / "failed").iterdir()) == []
    (dealt / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to .*file: File exists"):
        find_duplicates(splits, read_dealt(dealt), NEAR, dealt / "file")


def test_memory_of_signing_is_bounded_for_very_short_documents(tmp_path: Path) -> None:
    config = CleanConfig(deduplicate="minhash")
    peaks = []
    for num_documents in (5_000, 10_000):
        documents = (((0, i), f"yes no {i}") for i in range(num_documents))
        tracemalloc.start()
        write_signatures(documents, config, tmp_path / "signatures.npy")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Some 300 bytes a document of keys and digests; unbounded batches took 6,400.
    assert (peaks[1] - peaks[0]) / 5_000 < 1_000
