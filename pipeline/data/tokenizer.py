"""From text to a trained or loaded tokenizer, and from texts to flat arrays of token ids.

`tokenizers` trains, defines and saves a tokenizer. `fastokens` reads the same file and encodes some
hundred times faster; it is used when its ids equal those of the reference on a probe set and on the
first documents. Text that looks like a special token is encoded as the text it is, so no document
can forge the end of another.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.config.data import TokenizerConfig
from pipeline.errors import DataError

PROBES = (
    "",
    " ",
    "\n",
    "\n'then he said, \"it's  DON'T'LL\"\n\n\t end \r\n",
    "a<|endoftext|>b <s></s>[UNK][CLS]<unk><pad><|im_start|>",
    "0 12 345 6789 1e-9 3.14 1,000,000 \u0663\u0664\u0665 \u00bd \u2167",
    "na\u00efve caf\u00e9 e\u0301 \ufb01 \u017f\u0130\u0131 \u1e9e \u00df \u03a3\u03c2",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0ba4\u0bae\u0bbf\u0bb4\u0bcd",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\U0001f44d\U0001f3fd \U0001d504 \u2620\ufe0f",
    "a\u00a0b\u2003c\u205fd\u3000e\u2028f\u2029g\u0085h\u200bi\ufeffj\x0bk\x0cl\x00m\x7fn",
    "def f(x):\n    return x  # \u00b5s\n\n\n\nclass A:\tpass\r\n\r\n",
    "x" * 300 + " " * 70 + "-" * 130 + "\n" * 40,
    "\ufffd\uffff\U0010ffff \ue000",
)
"""Strings on which encoders that only nearly agree have been seen to differ."""

BYTE_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")

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


class ReferenceEncoder:
    """Encodes with `tokenizers`."""

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer = _parse(tokenizer_json, "tokenizer")

    def encode(self, texts: Sequence[str]) -> tuple[UInt32Array, Int64Array]:
        """Encode texts; see `Encoder`."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        parts = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        offsets = np.cumsum([0] + [len(part) for part in parts], dtype=np.int64)
        return np.concatenate([np.empty(0, dtype=np.uint32), *parts]), offsets


class FastEncoder:
    """Encodes with `fastokens`."""

    def __init__(self, tokenizer_json: str) -> None:
        import fastokens

        self._tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)

    def encode(self, texts: Sequence[str]) -> tuple[UInt32Array, Int64Array]:
        """Encode texts; see `Encoder`."""
        ids, offsets = self._tokenizer.encode_batch_flat(
            list(texts), add_special_tokens=False, split_special_tokens=True
        )
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """Which library encodes, and why."""

    name: str
    version: str
    messages: list[str]


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """A tokenizer and what the shards need to know of it."""

    tokenizer_json: str
    vocab_size: int
    """Largest id + 1."""
    end_of_document_id: int
    token_bytes: npt.NDArray[np.int32]
    """[vocab_size] raw bytes that each id stands for; 0 for special tokens."""


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> TokenizerFacts:
    """Train a byte-level BPE; every text can be encoded and decoded without loss.

    Args:
        texts: Documents.
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
    tokenizer.train_from_iterator(texts, trainer)
    return _facts(tokenizer, config.end_of_document, "the trained tokenizer")


def load_tokenizer(path: Path, end_of_document: str) -> TokenizerFacts:
    """Load a `tokenizer.json` of any kind.

    Raises:
        DataError: The file cannot be read, is no tokenizer, or lacks the end-of-document token.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise DataError(f"cannot read tokenizer {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"tokenizer {path} is not UTF-8 text") from exc
    return _facts(_parse(text, str(path)), end_of_document, str(path))


@lru_cache(maxsize=1)
def build_encoder(name: str, tokenizer_json: str) -> Encoder:
    """Build an encoder by the name that a manifest records; a worker keeps it for its next task."""
    return FastEncoder(tokenizer_json) if name == "fastokens" else ReferenceEncoder(tokenizer_json)


def choose_encoder(tokenizer: TokenizerFacts, texts: Sequence[str]) -> EncoderChoice:
    """Take the fast encoder if it gives the ids of the reference, else the reference.

    Args:
        tokenizer: The tokenizer.
        texts: First documents of the source.
    """
    name = "tokenizers"
    ids, offsets = ReferenceEncoder(tokenizer.tokenizer_json).encode([*PROBES, *texts])
    reason = _difference(tokenizer.tokenizer_json, [*PROBES, *texts], ids, offsets)
    message = f"encoder tokenizers {version(name)}: {reason}"
    if reason is None:
        name = "fastokens"
        message = (
            f"encoder fastokens {version(name)}: same ids as tokenizers {version('tokenizers')} "
            f"on {len(PROBES)} probes and {len(texts)} documents"
        )
    messages = [message]
    num_bytes = sum(len(text.encode()) for text in texts)
    num_token_bytes = int(tokenizer.token_bytes[ids[offsets[len(PROBES)] :]].sum(dtype=np.int64))
    if num_token_bytes != num_bytes:
        messages.append(
            f"this tokenizer changes text: its tokens stand for {num_token_bytes:,} bytes where "
            f"the first documents have {num_bytes:,}; bits per byte counts the bytes of the tokens"
        )
    return EncoderChoice(name=name, version=version(name), messages=messages)


def _difference(
    tokenizer_json: str, texts: list[str], expected_ids: UInt32Array, expected_offsets: Int64Array
) -> str | None:
    """Say why the fast encoder cannot be used, or None when it can."""
    try:
        fast = FastEncoder(tokenizer_json)
    except ImportError:
        return "fastokens is not installed"
    except (ValueError, RuntimeError, NotImplementedError) as exc:
        return f"fastokens cannot read this tokenizer ({exc})"
    ids, offsets = fast.encode(texts)
    if np.array_equal(ids, expected_ids) and np.array_equal(offsets, expected_offsets):
        return None
    return "fastokens gives other ids on the probes or the first documents"


def _parse(tokenizer_json: str, origin: str) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as exc:  # the library raises bare Exception for every malformed file
        raise DataError(f"{origin} is not a tokenizer.json: {exc}") from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _facts(tokenizer: Any, end_of_document: str, origin: str) -> TokenizerFacts:
    end_id = tokenizer.token_to_id(end_of_document)
    if end_id is None:
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        hint = f"its special tokens are {special}" if special else "it has no special tokens"
        raise DataError(
            f"{origin} has no end-of-document token {end_of_document!r}; {hint}: "
            "name one by data.tokenizer.end_of_document"
        )
    tokenizer.add_special_tokens([end_of_document])
    tokenizer.encode_special_tokens = True
    if end_id in tokenizer.encode(end_of_document, add_special_tokens=False).ids:
        raise DataError(
            f"{origin} encodes the text {end_of_document!r} in a document as its end-of-document "
            "token; name a token that is marked special by data.tokenizer.end_of_document"
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
    )


def _byte_counter(tokenizer: Any) -> Any:
    """Give the function from a token and its id to the number of raw bytes it stands for."""
    from tokenizers import pre_tokenizers

    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
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
