"""The synthetic source: documents of random words, a function of the seed alone."""

from collections.abc import Iterator

import numpy as np

from pipeline.config.data import SourceConfig, SyntheticConfig
from pipeline.data.documents import Document, Piece, Record, too_large
from pipeline.data.sources import SPLIT_BYTES

NAME = "synthetic"
CONSONANTS = "bcdfghjklmnprstvwz"
VOWELS = "aeiou"
WORD_BYTES = 6
"""Mean bytes of a word with its space, about."""
SENTENCE_WORDS = 12


class SyntheticSource:
    """Made-up words with Zipf's frequencies in documents of geometric length."""

    def __init__(self, config: SourceConfig, max_document_bytes: int, field: str) -> None:
        self._config = config.synthetic
        self._limit_bytes = max_document_bytes
        del field  # nothing can be wrong with what is made here

    def contents(self) -> list[dict[str, str]]:
        """Give nothing: the config says all."""
        return []

    def pieces(self) -> list[Piece]:
        """Cut the documents by number."""
        config = self._config
        step = max(1, SPLIT_BYTES // (config.mean_words * WORD_BYTES))
        return [
            Piece(
                path=NAME,
                name=NAME,
                start=start,
                stop=min(start + step, config.num_documents),
                weight_bytes=SPLIT_BYTES,
            )
            for start in range(0, config.num_documents, step)
        ]

    def read(self, piece: Piece) -> Iterator[Record]:
        """Make the documents of a range."""
        piece.check_readable()
        words = [make_word(i) for i in range(self._config.vocabulary_words)]
        shares = 1.0 / np.arange(1, len(words) + 1)
        cumulative = np.cumsum(shares / shares.sum())
        for number in range(piece.start, piece.stop):
            text = make_text(self._config, number, words, cumulative)
            # The words are ASCII: as many bytes as characters.
            if len(text) > self._limit_bytes:
                yield too_large(f"{NAME} document {number}", len(text), self._limit_bytes)
            else:
                yield Document(id=f"{NAME}-{number}", parts=(text,), source=NAME)


def make_text(
    config: SyntheticConfig, number: int, words: list[str], cumulative: np.ndarray
) -> str:
    """Make one document.

    Args:
        config: Seed and mean length.
        number: Which document.
        words: The vocabulary, most frequent first.
        cumulative: Sums of the words' probabilities.
    """
    generator = np.random.default_rng([config.seed, number])
    length = int(generator.geometric(1.0 / config.mean_words))
    drawn = np.searchsorted(cumulative, generator.random(length), side="right")
    chosen = [words[min(i, len(words) - 1)] for i in drawn.tolist()]
    sentences = [
        " ".join(chosen[start : start + SENTENCE_WORDS]).capitalize() + "."
        for start in range(0, length, SENTENCE_WORDS)
    ]
    return " ".join(sentences)


def make_word(number: int) -> str:
    """Give a word that can be spoken, another for each number."""
    syllables = []
    number += 1
    while number:
        number, rest = divmod(number - 1, len(CONSONANTS) * len(VOWELS))
        syllables.append(CONSONANTS[rest // len(VOWELS)] + VOWELS[rest % len(VOWELS)])
    return "".join(syllables)
