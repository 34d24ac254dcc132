"""From a corpus directory to what each contender reads: its documents once, many times, or a few.

Repeated documents keep their text and get ids of their own, so that nothing takes them for one.
"""

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO

import zstandard

PART_BYTES = 64_000_000
"""Of a part of the repeated corpus; below the 64 MiB that one task of ours reads at most."""
NUM_PEER_FILES = 4
"""Plain files that the corpus is dealt into for the peers, so that each can use two cores."""
TINY_DOCUMENTS = 8
TINY_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class CorpusDocument:
    """One line of the corpus."""

    id: str
    text: str
    rest: str
    """The line without its id, from the comma on, to write it again under another id."""

    def line(self, document_id: str) -> bytes:
        """Give the line with this id."""
        return f'{{"id": {json.dumps(document_id)}{self.rest}\n'.encode()


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A directory of JSON lines and what is known of it."""

    directory: Path
    text_bytes: int
    document_ids: tuple[tuple[str, str], ...]
    """(id in the files, id of the corpus document with the same text), in the order of the files
    by name."""


def read_corpus(directory: Path) -> list[CorpusDocument]:
    """Read every `.jsonl` and `.jsonl.zst` of a directory.

    Raises:
        SystemExit: There is none.
    """
    paths = sorted(p for p in directory.iterdir() if p.name.endswith((".jsonl", ".jsonl.zst")))
    if not paths:
        raise SystemExit(f"{directory} holds no .jsonl or .jsonl.zst (--corpus)")
    return [_document(line) for path in paths for line in read_lines(path)]


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a plain or a zstd file."""
    with path.open("rb") as stream:
        if path.suffix == ".zst":
            reader = zstandard.ZstdDecompressor().stream_reader(stream)
            yield from io.BufferedReader(reader, 1 << 20)
        else:
            yield from stream


def write_repeated(
    documents: Sequence[CorpusDocument], directory: Path, num_bytes: float, suffix: str
) -> Corpus:
    """Write documents again and again, in parts, until they hold `num_bytes` of text.

    Args:
        documents: The corpus.
        directory: Where the parts go; made here.
        num_bytes: Text bytes to reach.
        suffix: `.jsonl` or `.jsonl.zst`.
    """
    directory.mkdir(parents=True)
    ids: list[tuple[str, str]] = []
    text_bytes = part_bytes = num_parts = 0
    stream: IO[bytes] | None = None
    for repetition, document in _endlessly(documents):
        if text_bytes >= num_bytes:
            break
        line = document.line(f"{repetition}-{document.id}")
        if stream is None or part_bytes + len(line) > PART_BYTES:
            if stream is not None:
                stream.close()
            stream, part_bytes = _open(directory / f"part-{num_parts:04d}{suffix}"), 0
            num_parts += 1
        stream.write(line)
        part_bytes += len(line)
        text_bytes += len(document.text.encode())
        ids.append((f"{repetition}-{document.id}", document.id))
    if stream is not None:
        stream.close()
    return Corpus(directory=directory, text_bytes=text_bytes, document_ids=tuple(ids))


def write_dealt(documents: Sequence[CorpusDocument], directory: Path) -> Corpus:
    """Deal the documents once into plain files; `all/all.jsonl` holds the same lines in order."""
    (directory / "dealt").mkdir(parents=True)
    (directory / "all").mkdir()
    ordered: list[CorpusDocument] = []
    with (directory / "all" / "all.jsonl").open("wb") as together:
        for number in range(NUM_PEER_FILES):
            dealt = documents[number::NUM_PEER_FILES]
            data = b"".join(document.line(document.id) for document in dealt)
            (directory / "dealt" / f"{number}.jsonl").write_bytes(data)
            together.write(data)
            ordered += dealt
    return Corpus(
        directory=directory,
        text_bytes=sum(len(document.text.encode()) for document in documents),
        document_ids=tuple((document.id, document.id) for document in ordered),
    )


def write_joined(corpus: Corpus, path: Path) -> None:
    """Write all plain parts of a corpus into one file, in order."""
    with path.open("wb") as together:
        for part in sorted(corpus.directory.iterdir()):
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, together, 1 << 20)


def cut_tiny(documents: Sequence[CorpusDocument]) -> list[CorpusDocument]:
    """Give a few short documents, for a run that costs nothing but its start."""
    cut = []
    for number, document in enumerate(documents[:: max(1, len(documents) // TINY_DOCUMENTS)]):
        record = {"id": f"tiny-{number}", "text": document.text[:TINY_CHARACTERS]}
        cut.append(_document(json.dumps(record).encode()))
    return cut[:TINY_DOCUMENTS]


def is_held_out(document_id: str, validation_fraction: float) -> bool:
    """Tell from the documented rule, not from our code, whether a document is in validation."""
    return int(sha256(document_id.encode()).hexdigest()[:12], 16) < validation_fraction * 16**12


def _document(line: bytes) -> CorpusDocument:
    record = json.loads(line)
    document_id, text = str(record.pop("id")), record["text"]
    rest = json.dumps(record, ensure_ascii=False)[1:]
    return CorpusDocument(id=document_id, text=text, rest=f", {rest}")


def _endlessly(documents: Sequence[CorpusDocument]) -> Iterator[tuple[int, CorpusDocument]]:
    repetition = 0
    while True:
        yield from ((repetition, document) for document in documents)
        repetition += 1


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".zst":
        compressed: IO[bytes] = zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(level=3))
        return compressed
    return path.open("wb")
