"""The embedded source: two small corpora inside this package."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.config.data import SourceConfig
from pipeline.data.documents import Piece, Record
from pipeline.data.jsonl import read_jsonl
from pipeline.data.plain_text import read_parts
from pipeline.data.sources import SPLIT_BYTES, whole_piece
from pipeline.data.storage import SourceFile, describe_contents, find_files

DOCUMENT_BYTES = 4096
"""Tiny Shakespeare is one file; documents of this size make a split by document possible."""


class EmbeddedSource:
    """Chapters of three novels, and the plays of Tiny Shakespeare cut at speeches."""

    def __init__(self, config: SourceConfig, max_document_bytes: int, field: str) -> None:
        del config  # nothing can be chosen
        self._limit_bytes = max_document_bytes
        self._field = field

    def contents(self) -> list[dict[str, str]]:
        """Give name and sha256 of each file."""
        return describe_contents(self._files())

    def pieces(self) -> list[Piece]:
        """Give each file, heavy enough to be a split of its own."""
        return [
            Piece(**{**vars(whole_piece(file)), "weight_bytes": SPLIT_BYTES})
            for file in self._files()
        ]

    def read(self, piece: Piece) -> Iterator[Record]:
        """Yield the documents of a file."""
        piece.check_readable()
        if piece.name.endswith(".txt"):
            return read_parts(piece, DOCUMENT_BYTES, self._limit_bytes)
        return read_jsonl(piece, "text", "id", self._limit_bytes, field=self._field)

    def _files(self) -> list[SourceFile]:
        corpus = Path(__file__).parent / "corpus"
        return find_files(str(corpus), (".txt", ".jsonl"), self._field)
