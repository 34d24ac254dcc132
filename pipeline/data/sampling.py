"""From sources to a bounded part of their text: to train a tokenizer on, and to try encoders on."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from pipeline.config.data import DataConfig
from pipeline.data.documents import Document
from pipeline.data.filters import build_cleaner
from pipeline.data.sources import Source, Split
from pipeline.data.split_reader import BadPiece, SplitReader

TRAINING_CHARACTERS = 64 << 20
"""Text that a tokenizer is trained on at most, spread evenly over the splits of the source."""
FILTERED_TRAINING_CHARACTERS = 4 << 20
"""The same where filters are on: they take a second for some 100,000 characters, one by one."""
CHECKED_CHARACTERS = 1 << 16
"""Text of the first documents on which the fast encoder must equal the reference, before it is
compared on each file; every start waits for it."""


def sample_documents(
    data: DataConfig, sources: dict[str, Source], splits: list[Split]
) -> Iterator[Document]:
    """Yield the beginning of every split, cleaned, to train a tokenizer on.

    Raises:
        DataError: The text is bad, and the policy is to fail.
    """
    limit = FILTERED_TRAINING_CHARACTERS if data.clean.filters else TRAINING_CHARACTERS
    for split in splits:
        yield from _head(_documents(data, sources[split.source], split), limit // len(splits))


def first_texts(data: DataConfig, sources: dict[str, Source], splits: list[Split]) -> list[str]:
    """Give the beginning of the first source, to compare encoders on.

    Raises:
        DataError: The text is bad, and the policy is to fail.
    """
    documents = chain.from_iterable(
        _documents(data, sources[split.source], split) for split in splits
    )
    return [document.text for document in _head(documents, CHECKED_CHARACTERS)]


def _documents(data: DataConfig, source: Source, split: Split) -> Iterator[Document]:
    """Yield documents; of a piece that turns out bad, those before that are given all the same."""
    cleaner = build_cleaner(data.clean)
    for piece in split.pieces:
        reader = SplitReader(replace(split, pieces=(piece,)), data, source, cleaner)
        try:
            yield from (document for _, document in reader.documents())
        except BadPiece as bad:
            reader.leave_out(bad.number, bad.error)


def _head(documents: Iterable[Document], num_characters: int) -> Iterator[Document]:
    for document in documents:
        text = document.beginning(num_characters)
        yield Document(id=document.id, parts=(text,), source=document.source)
        num_characters -= len(text)
        if num_characters <= 0:
            return
