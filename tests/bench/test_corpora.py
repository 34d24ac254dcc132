"""What the benchmark feeds its contenders: every text, as often as said, under ids of its own."""

import json
from pathlib import Path

import pytest

from tests.bench import corpora
from tests.bench.corpora import (
    CorpusDocument,
    cut_tiny,
    is_held_out,
    read_corpus,
    read_lines,
    write_dealt,
    write_repeated,
)


@pytest.fixture
def documents(tmp_path: Path) -> list[CorpusDocument]:
    records = [{"id": f"d{i}", "text": "\u00fc" * i, "title": f"t{i}"} for i in range(1, 11)]
    (tmp_path / "in").mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "in" / "a.jsonl").write_text(text)
    return read_corpus(tmp_path / "in")


def records_of(directory: Path) -> list[dict[str, str]]:
    return [json.loads(line) for path in sorted(directory.iterdir()) for line in read_lines(path)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_repeated_documents_keep_their_text_and_get_ids_of_their_own(
    tmp_path: Path, documents: list[CorpusDocument], suffix: str
) -> None:
    # 110 bytes a repetition; 250 are reached by documents 1 to 5 of the third (220 + 30 = 250).
    corpus = write_repeated(documents, tmp_path / "out", 250, suffix)
    records = records_of(tmp_path / "out")
    assert corpus.text_bytes == 250 == sum(len(record["text"].encode()) for record in records)
    assert [record["id"] for record in records] == [one for one, _ in corpus.document_ids]
    assert len({record["id"] for record in records}) == len(records) == 25
    texts = {document.id: document.text for document in documents}
    assert [record["text"] for record in records] == [texts[one] for _, one in corpus.document_ids]
    assert [record["title"] for record in records[:10]] == [f"t{i}" for i in range(1, 11)]


def test_a_part_ends_before_it_is_too_large(tmp_path: Path) -> None:
    text = "x" * 30_000_000
    long = [CorpusDocument(id=f"d{i}", text=text, rest=f', "text": "{text}"}}') for i in range(3)]
    write_repeated(long, tmp_path / "out", 90_000_000, ".jsonl")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").iterdir())]
    assert len(sizes) == 2
    assert max(sizes) <= corpora.PART_BYTES


def test_dealt_files_hold_every_document_once(
    tmp_path: Path, documents: list[CorpusDocument]
) -> None:
    corpus = write_dealt(documents, tmp_path / "once")
    dealt, together = records_of(tmp_path / "once" / "dealt"), records_of(tmp_path / "once" / "all")
    assert dealt == together
    assert [(record["id"],) * 2 for record in dealt] == list(corpus.document_ids)
    assert sorted(record["text"] for record in dealt) == sorted(d.text for d in documents)
    assert len(list((tmp_path / "once" / "dealt").iterdir())) == corpora.NUM_PEER_FILES


def test_the_tiny_corpus_has_documents_in_both_splits(documents: list[CorpusDocument]) -> None:
    tiny = cut_tiny(documents * 1000)
    assert len(tiny) == corpora.TINY_DOCUMENTS
    assert {is_held_out(document.id, 0.5) for document in tiny} == {True, False}
