"""From text to a trained tokenizer, from a file to a loaded one, and what the shards ask of it.

Text that looks like a special token is encoded as the text it is, unless the config says otherwise,
so no document can forge the end of another.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.data import TokenizerConfig
from pipeline.errors import DataError

MAX_DISTINCT_BYTES = 8 << 20
"""UTF-8 bytes of all different words to train on. The trainer holds every different word, at some
130 bytes a byte, whatever the length of the text: 1.2 GB at most, measured on random words.
64 Mi characters of English have 2.7 MB and take 0.2 GB."""
COUNTED_CHARACTERS = 1 << 20
"""Characters whose words are counted at once."""

BYTE_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """A tokenizer and what the shards need to know of it."""

    tokenizer_json: str
    vocab_size: int
    """Largest id + 1."""
    end_of_document_id: int
    token_bytes: npt.NDArray[np.int32]
    """[vocab_size] raw bytes that each id stands for; 0 for special tokens."""
    added_tokens: tuple[str, ...]
    """Tokens that are looked for in text before it is split into words."""
    special_tokens_in_text: bool
    """Whether the special ones among them are."""


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> TokenizerFacts:
    """Train a byte-level BPE; every text can be encoded and decoded without loss.

    Args:
        texts: Documents; used up to `MAX_DISTINCT_BYTES` of different words.
        config: Vocabulary size and the end-of-document token, which takes id 0.

    Raises:
        DataError: The tokenizer cannot be used; see `load_tokenizer`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.end_of_document],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(bound_words(texts), trainer)
    return _facts(
        tokenizer, config.end_of_document, config.special_tokens_in_text, "the trained tokenizer"
    )


def bound_words(texts: Iterable[str], num_bytes: int = MAX_DISTINCT_BYTES) -> Iterator[str]:
    """Yield texts until their different words, parted by whitespace, have so many UTF-8 bytes."""
    words: set[str] = set()
    for text in texts:
        for start in range(0, len(text), COUNTED_CHARACTERS):
            new = set(text[start : start + COUNTED_CHARACTERS].split()) - words
            num_bytes -= sum(len(word.encode()) for word in new)
            if num_bytes < 0:
                yield text[:start]
                return
            words |= new
        yield text


def load_tokenizer(
    path: Path, end_of_document: str, special_tokens_in_text: bool = False
) -> TokenizerFacts:
    """Load a `tokenizer.json` of any kind.

    Args:
        path: The file.
        end_of_document: The token that closes each document.
        special_tokens_in_text: Whether text can name special tokens, this one included.

    Raises:
        DataError: The file cannot be read, is no tokenizer, or lacks the end-of-document token.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise DataError(f"cannot read tokenizer {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"tokenizer {path} is not UTF-8 text") from exc
    tokenizer = parse_tokenizer(text, str(path))
    return _facts(tokenizer, end_of_document, special_tokens_in_text, str(path))


def parse_tokenizer(tokenizer_json: str, origin: str) -> Any:
    """Read a `tokenizer.json` without its truncation and padding.

    Raises:
        DataError: It is none.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as exc:  # the library raises bare Exception for every malformed file
        raise DataError(f"{origin} is not a tokenizer.json: {exc}") from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _facts(
    tokenizer: Any, end_of_document: str, special_tokens_in_text: bool, origin: str
) -> TokenizerFacts:
    end_id = tokenizer.token_to_id(end_of_document)
    if end_id is None:
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        hint = f"its special tokens are {special}" if special else "it has no special tokens"
        raise DataError(
            f"{origin} has no end-of-document token {end_of_document!r}; {hint}: "
            "name one by data.tokenizer.end_of_document"
        )
    tokenizer.add_special_tokens([end_of_document])
    tokenizer.encode_special_tokens = not special_tokens_in_text
    ids_of_text = tokenizer.encode(end_of_document, add_special_tokens=False).ids
    if end_id in ids_of_text and not special_tokens_in_text:
        raise DataError(
            f"{origin} encodes the text {end_of_document!r} in a document as its end-of-document "
            "token, so that a document could end itself; name a token that is marked special and "
            "is no word of the model by data.tokenizer.end_of_document, or allow it by "
            "data.tokenizer.special_tokens_in_text=true"
        )
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    token_bytes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    count_bytes = _byte_counter(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    for token, token_id in vocabulary.items():
        if token_id in added:
            token_bytes[token_id] = 0 if added[token_id].special else len(token.encode())
        else:
            token_bytes[token_id] = count_bytes(token, token_id)
    return TokenizerFacts(
        tokenizer_json=tokenizer.to_str(),
        vocab_size=len(token_bytes),
        end_of_document_id=end_id,
        token_bytes=token_bytes,
        added_tokens=tuple(token.content for token in added.values()),
        special_tokens_in_text=special_tokens_in_text,
    )


def _byte_counter(tokenizer: Any) -> Any:
    """Give the function from a token and its id to the number of raw bytes it stands for."""
    from tokenizers import pre_tokenizers

    # The whole tokenizer as JSON holds every merge, and takes 0.15 s to write and parse.
    decoder = {} if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    parts = [part.get("type") for part in decoder.get("decoders", [decoder])]
    if "ByteLevel" in parts:
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        # One character of a byte-level token is one byte; its UTF-8 length would count bytes
        # outside ASCII twice.
        return lambda token, _: len(token) if set(token) <= alphabet else len(token.encode())

    # Decoders treat the first token differently, so each is decoded behind an ordinary one.
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    anchor = [min(set(tokenizer.get_vocab().values()) - special)]
    base = len(tokenizer.decode(anchor).encode())

    def added_bytes(token: str, token_id: int) -> int:
        if BYTE_FALLBACK.fullmatch(token):
            return 1
        return len(tokenizer.decode([*anchor, token_id]).encode()) - base

    return added_bytes


def decode(tokenizer_json: str, ids: Sequence[int]) -> str:
    """Give the text that token ids stand for, special tokens as the text that names them.

    Raises:
        DataError: The file is no tokenizer.
    """
    text: str = _decoder(tokenizer_json).decode(list(ids), skip_special_tokens=False)
    return text


@lru_cache(maxsize=1)
def _decoder(tokenizer_json: str) -> Any:
    return parse_tokenizer(tokenizer_json, "tokenizer.json")
