"""What every source of `SOURCES` promises, on corpora that are cut into several pieces."""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import zstandard

import pipeline.data
from pipeline.config.data import PATHLESS_KINDS, DataConfig, SyntheticConfig
from pipeline.data import SOURCES
from pipeline.data.documents import BadFile, BadRecord, Document, Record
from pipeline.data.plan import fingerprint, plan_recipe
from pipeline.data.sources import Source, build_sources
from pipeline.data.synthetic import make_text, make_word
from pipeline.errors import DataError

pytestmark = pytest.mark.slow

SMALL = ["one", "zwei \u00df", "\U0001f44d three", "four"]
SYNTHETIC = {"num_documents": 300, "mean_words": 20, "vocabulary_words": 50}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A corpus of one kind."""

    fields: Mapping[str, Any]
    """Of its `SourceConfig`, beside kind and path."""
    write: Callable[[Path], list[str]]
    """Writes the corpus below a directory that is there; joined, its answer is all the text."""
    num_pieces: int
    change: str | None = None
    """A file with text, in which a byte can be changed."""
    other: Mapping[str, Any] | None = None
    """Where there is no file: fields that give other text."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus that stands, and what its source made of it."""

    kind: str
    case: Case
    root: Path
    text: str
    records: list[Record]

    def config(self, root: Path | None = None, **fields: Any) -> DataConfig:
        """Give a config that reads the corpus, here or where it has been moved to."""
        places = {} if self.kind in PATHLESS_KINDS else {"path": str(root or self.root)}
        max_document_bytes = fields.pop("max_document_bytes", 1 << 26)
        source = {"kind": self.kind, **places, **self.case.fields, **fields}
        sources = {"mine": source}
        return DataConfig.model_validate(
            {"sources": sources, "max_document_bytes": max_document_bytes}
        )

    def build(self, root: Path | None = None, **fields: Any) -> Source:
        return build_sources(self.config(root, **fields))["mine"]


def large() -> list[str]:
    """Give texts of a megabyte, together more than one task reads."""
    return [f"{i}: {'sea ship garden ' * 65_000}" for i in range(70)]


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_jsonl(root: Path) -> list[str]:
    texts = large()
    write_lines(root / "a.jsonl", [json.dumps({"text": t, "n": 1}) for t in texts])
    (root / "sub").mkdir()
    lines = "".join(json.dumps({"id": f"given{i}", "text": t}) + "\n" for i, t in enumerate(SMALL))
    (root / "sub" / "b.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    return texts + SMALL


def write_text_lines(root: Path) -> list[str]:
    texts = large()
    write_lines(root / "a.txt", texts)
    write_lines(root / "b.txt", SMALL)
    return texts + SMALL


def write_text_parts(root: Path) -> list[str]:
    texts = [f"{text}\n\n" for text in large()]
    (root / "a.txt").write_text("".join(texts))
    (root / "b.txt").write_text(SMALL[1], encoding="utf-8")
    return [*texts, SMALL[1]]


def write_text_files(root: Path) -> list[str]:
    for number, text in enumerate(SMALL):
        (root / f"{number}.md").write_text(text, encoding="utf-8")
    return SMALL


def write_parquet(root: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = large()
    for name, rows in (("a", texts), ("b", SMALL)):
        table = pa.table({"n": range(len(rows)), "text": rows})
        pq.write_table(table, root / f"{name}.parquet", row_group_size=5, use_dictionary=False)
    return texts + SMALL


def write_saved_dataset(root: Path) -> list[str]:
    import datasets

    texts = [f"text {i}" for i in range(10_001)]
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(root)
    return texts


def write_dataset_files(root: Path) -> list[str]:
    for number in range(3):
        write_lines(root / f"train-{number}.jsonl", [json.dumps({"text": t}) for t in SMALL])
    return SMALL * 3


def read_embedded(root: Path) -> list[str]:
    del root
    corpus = Path(pipeline.data.__file__).parent / "corpus"
    with zstandard.open(corpus / "classics.jsonl.zst", "rt", encoding="utf-8") as stream:
        chapters = [json.loads(line)["text"] for line in stream]
    return [*chapters, (corpus / "tinyshakespeare.txt").read_text()]


def make_synthetic(root: Path) -> list[str]:
    del root
    config = SyntheticConfig.model_validate(SYNTHETIC)
    words = [make_word(i) for i in range(config.vocabulary_words)]
    shares = 1.0 / np.arange(1, len(words) + 1)
    cumulative = np.cumsum(shares / shares.sum())
    return [make_text(config, i, words, cumulative) for i in range(config.num_documents)]


CASES = {
    "jsonl": Case(fields={}, write=write_jsonl, num_pieces=3, change="sub/b.jsonl.zst"),
    "parquet": Case(fields={}, write=write_parquet, num_pieces=3, change="b.parquet"),
    "text by line": Case(
        fields={"document": "line"}, write=write_text_lines, num_pieces=3, change="b.txt"
    ),
    "text in parts": Case(
        fields={"document_bytes": 1}, write=write_text_parts, num_pieces=3, change="b.txt"
    ),
    "text by file": Case(fields={}, write=write_text_files, num_pieces=4, change="2.md"),
    "huggingface saved": Case(
        fields={}, write=write_saved_dataset, num_pieces=2, change="data-00000-of-00001.arrow"
    ),
    "huggingface files": Case(
        fields={}, write=write_dataset_files, num_pieces=3, change="train-1.jsonl"
    ),
    "embedded": Case(fields={}, write=read_embedded, num_pieces=2),
    "synthetic": Case(
        fields={"synthetic": SYNTHETIC},
        write=make_synthetic,
        num_pieces=1,
        other={"synthetic": {**SYNTHETIC, "seed": 1}},
    ),
}


def test_every_registered_source_stands_here() -> None:
    assert {name.split()[0] for name in CASES} == set(SOURCES)


def read(source: Source) -> list[Record]:
    return [record for piece in source.pieces() for record in source.read(piece)]


@pytest.fixture(scope="module", params=CASES)
def corpus(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Corpus]:
    """A corpus of each case in turn."""
    case, kind = CASES[request.param], request.param.split()[0]
    root = tmp_path_factory.mktemp("corpora") / "here"
    root.mkdir()
    made = Corpus(kind=kind, case=case, root=root, text="".join(case.write(root)), records=[])
    made.records.extend(read(made.build()))
    yield made
    made.records.clear()


def test_pieces_hold_all_of_the_text_once(corpus: Corpus) -> None:
    assert "".join(r.text for r in corpus.records if isinstance(r, Document)) == corpus.text
    pieces = corpus.build().pieces()
    assert len(pieces) == corpus.case.num_pieces
    for before, piece in pairwise(pieces):
        assert piece.start == (before.stop if piece.path == before.path else 0)
    assert len({(p.path, p.start) for p in pieces}) == len(pieces)
    assert all(p.start < p.stop and p.weight_bytes > 0 for p in pieces)


def test_records_are_documents_that_name_their_file_and_not_its_place(corpus: Corpus) -> None:
    names = {piece.name for piece in corpus.build().pieces()}
    for record in corpus.records:
        assert isinstance(record, Document)
        assert record.num_bytes == len(record.text.encode())
        assert record.source.startswith(tuple(names))
        assert str(corpus.root) not in record.source + record.id


def test_ids_are_unique(corpus: Corpus) -> None:
    ids = [record.id for record in corpus.records if isinstance(record, Document)]
    assert all(ids)
    assert len(set(ids)) == len(ids)


def test_another_process_reads_the_same_pieces_and_documents_in_the_same_order(
    corpus: Corpus,
) -> None:
    there = build_sources(pickle.loads(pickle.dumps(corpus.config())))["mine"]
    pieces = corpus.build().pieces()
    assert there.pieces() == pieces
    # The last first: what a piece gives does not depend on those before it.
    for piece in reversed(pieces):
        records = list(there.read(pickle.loads(pickle.dumps(piece))))
        start = corpus.records.index(records[0])
        assert corpus.records[start : start + len(records)] == records


def test_a_corpus_that_is_moved_keeps_contents_ids_and_order(corpus: Corpus) -> None:
    contents = corpus.build().contents()
    elsewhere = corpus.root.parent / "elsewhere"
    corpus.root.rename(elsewhere)
    try:
        source = corpus.build(elsewhere)
        assert source.contents() == contents
        assert read(source) == corpus.records
    finally:
        elsewhere.rename(corpus.root)


def test_contents_are_names_and_digests_and_change_with_a_byte(corpus: Corpus) -> None:
    def recipe(**fields: Any) -> str:
        data = corpus.config(**fields)
        return fingerprint(plan_recipe(data, build_sources(data)))

    before, contents = recipe(), corpus.build().contents()
    assert recipe() == before
    assert contents == json.loads(json.dumps(contents))
    assert [c["name"] for c in contents] == sorted({c["name"] for c in contents})
    assert all(c["sha256"] for c in contents)
    if corpus.case.other is not None:
        assert recipe(**corpus.case.other) != before
    if corpus.case.change is not None:
        path = corpus.root / corpus.case.change
        data = path.read_bytes()
        try:
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            assert recipe() != before
        finally:
            path.write_bytes(data)
        assert recipe() == before


def test_a_document_above_the_limit_is_a_bad_record_and_leaves_the_others_as_they_are(
    corpus: Corpus,
) -> None:
    sizes = [r.num_bytes for r in corpus.records if isinstance(r, Document)]
    limit = sorted(sizes)[len(sizes) // 2]
    records = read(corpus.build(max_document_bytes=limit))
    assert len(records) == len(sizes)
    for record, known, size in zip(records, corpus.records, sizes, strict=True):
        if size <= limit:
            assert record == known
        else:
            assert isinstance(record, BadRecord)
            assert record.reason == "too_large"
            assert f"data.max_document_bytes={limit:,}" in record.detail
            assert record.where


def test_a_piece_with_a_flaw_is_refused(corpus: Corpus) -> None:
    source = corpus.build()
    flawed = replace(source.pieces()[0], flaw=("missing_file", "it was gone"))
    with pytest.raises(BadFile, match="it was gone") as caught:
        list(source.read(flawed))
    assert caught.value.reason == "missing_file"


def test_what_is_not_there_is_an_error_that_names_the_field(corpus: Corpus) -> None:
    if corpus.kind in PATHLESS_KINDS:
        with pytest.raises(pydantic.ValidationError, match=f"kind={corpus.kind} takes no path"):
            corpus.config(path="nowhere")
        return
    source = corpus.build(corpus.root / "nowhere")
    for ask in (source.contents, source.pieces):
        with pytest.raises(DataError, match=r"nowhere.*data\.sources\.mine\.path"):
            ask()


def test_synthetic_documents_are_cut_by_number() -> None:
    many = {"kind": "synthetic", "synthetic": {"num_documents": 10**9}}
    pieces = build_sources(DataConfig.model_validate({"sources": {"mine": many}}))["mine"].pieces()
    assert (pieces[0].start, pieces[-1].stop) == (0, 10**9)
    assert all(after.start == before.stop for before, after in pairwise(pieces))
