"""From texts to flat arrays of token ids, long texts in pieces.

`tokenizers` is the reference; `fastokens` reads the same file and encodes some hundred times as
fast. Which of them encodes is decided in `encoder_choice`.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.data.exact_cuts import PIECE_CHARACTERS, cut_exactly, cuts_are_exact
from pipeline.data.tokenizer import parse_tokenizer

REFERENCE = "tokenizers"
"""Name of the encoder that defines the ids."""
DIFFERING_CHARACTERS = ("\u017f", "\u180e")
"""Characters on which `fastokens` 0.3.5 differs: the long s as a contraction ('s in any case, in
the patterns of Llama 3, Qwen 2 and GPT-4o) and the Mongolian vowel separator as whitespace (in
other patterns). Found by comparing all code points in 16 surroundings each."""

UInt32Array = npt.NDArray[np.uint32]
Int64Array = npt.NDArray[np.int64]


class Encoder(Protocol):
    """Turns texts into token ids."""

    def encode(self, texts: Sequence[str]) -> tuple[UInt32Array, Int64Array]:
        """Encode texts without adding special tokens.

        Returns:
            The ids of all texts back to back, and len(texts) + 1 offsets into them.
        """
        ...

    def encode_parts(self, parts: Iterable[str]) -> Iterator[UInt32Array]:
        """Encode one text that comes in parts; joined, what is yielded are its ids."""
        ...


class ReferenceEncoder:
    """Encodes with `tokenizers`."""

    def __init__(self, tokenizer_json: str, special_tokens_in_text: bool = False) -> None:
        self.tokenizer = parse_tokenizer(tokenizer_json, "tokenizer")
        self.tokenizer.encode_special_tokens = not special_tokens_in_text

    def encode(self, texts: Sequence[str]) -> tuple[UInt32Array, Int64Array]:
        """Encode texts; see `Encoder`."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _join([np.array(encoding.ids, dtype=np.uint32) for encoding in encodings])

    def encode_parts(self, parts: Iterable[str]) -> Iterator[UInt32Array]:
        """Encode one text as a whole; see `Encoder`."""
        yield self.encode(["".join(parts)])[0]


class FastEncoder:
    """Encodes with `fastokens`, and texts with characters that it is known to differ on without."""

    def __init__(self, tokenizer_json: str, special_tokens_in_text: bool = False) -> None:
        import fastokens

        self._tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)
        self._reference_arguments = (tokenizer_json, special_tokens_in_text)
        self._split_special_tokens = not special_tokens_in_text

    def encode(self, texts: Sequence[str]) -> tuple[UInt32Array, Int64Array]:
        """Encode texts; see `Encoder`."""
        if not any(map(_may_differ, texts)):
            return self._encode(texts)
        reference = build_reference(*self._reference_arguments)
        return _join(
            [
                (reference.encode([text]) if _may_differ(text) else self._encode([text]))[0]
                for text in texts
            ]
        )

    def encode_parts(self, parts: Iterable[str]) -> Iterator[UInt32Array]:
        """Encode one text as a whole; see `Encoder`."""
        yield self.encode(["".join(parts)])[0]

    def _encode(self, texts: Sequence[str]) -> tuple[UInt32Array, Int64Array]:
        ids, offsets = self._tokenizer.encode_batch_flat(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=self._split_special_tokens,
        )
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)


class PiecewiseEncoder:
    """Encodes long texts in pieces that give the ids of the whole."""

    def __init__(self, encoder: Encoder, piece_characters: int = PIECE_CHARACTERS) -> None:
        self._encoder = encoder
        self._piece_characters = piece_characters

    def encode(self, texts: Sequence[str]) -> tuple[UInt32Array, Int64Array]:
        """Encode texts; see `Encoder`."""
        if all(len(text) <= self._piece_characters for text in texts):
            return self._encoder.encode(texts)
        # It grows in place, where joining arrays would hold all ids twice.
        ids = bytearray()
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        for i, text in enumerate(texts):
            for piece_ids in self.encode_parts([text]):
                ids += piece_ids.data
            offsets[i + 1] = len(ids) // np.dtype(np.uint32).itemsize
        return np.frombuffer(ids, np.uint32), offsets

    def encode_parts(self, parts: Iterable[str]) -> Iterator[UInt32Array]:
        """Encode one text; see `Encoder`."""
        for piece in cut_exactly(parts, self._piece_characters):
            yield self._encoder.encode([piece])[0]


@lru_cache(maxsize=2)
def build_encoder(name: str, tokenizer_json: str, special_tokens_in_text: bool = False) -> Encoder:
    """Build an encoder by the name that a manifest records; a worker keeps it for its next task."""
    encoder: Encoder = (
        FastEncoder(tokenizer_json, special_tokens_in_text)
        if name == "fastokens"
        else build_reference(tokenizer_json, special_tokens_in_text)
    )
    if cuts_are_exact(tokenizer_json, special_tokens_in_text):
        return PiecewiseEncoder(encoder)
    return encoder


@lru_cache(maxsize=1)
def build_reference(tokenizer_json: str, special_tokens_in_text: bool) -> ReferenceEncoder:
    """Build the reference as it is, which cuts nothing."""
    return ReferenceEncoder(tokenizer_json, special_tokens_in_text)


def _may_differ(text: str) -> bool:
    return any(character in text for character in DIFFERING_CHARACTERS)


def _join(parts: list[UInt32Array]) -> tuple[UInt32Array, Int64Array]:
    offsets = np.cumsum([0] + [len(part) for part in parts], dtype=np.int64)
    return np.concatenate([np.empty(0, dtype=np.uint32), *parts]), offsets
