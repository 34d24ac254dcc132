"""From a tokenizer and some text to the encoder that is used: the fast one while its ids are right.

`fastokens` encodes when its ids equal those of `tokenizers` on a probe set, on the tokenizer's own
added tokens and on the first documents; and it is compared again on the first documents of every
file, because one file may hold what no other does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain

import numpy as np

from pipeline.data.encoders import (
    FastEncoder,
    Int64Array,
    UInt32Array,
    build_encoder,
    build_reference,
)
from pipeline.data.tokenizer import TokenizerFacts
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

CHECKED_FILE_CHARACTERS = 8 << 10
"""The reference encodes some 2 MB/s: 4 ms a file."""
CHECKED_TASK_CHARACTERS = 256 << 10
"""A task of very many small files spends at most some 0.1 s on comparing."""


class EncoderMismatch(DataError):
    """The fast encoder gives other ids than the reference; the text must be encoded by that."""


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """Which library encodes, and why."""

    name: str
    version: str
    messages: list[str]


def choose_encoder(tokenizer: TokenizerFacts, texts: Sequence[str]) -> EncoderChoice:
    """Take the fast encoder if it gives the ids of the reference, else the reference.

    Args:
        tokenizer: The tokenizer.
        texts: First documents of the source.
    """
    name = "tokenizers"
    probes = [*PROBES, *_own_probes(tokenizer)]
    reference = build_reference(tokenizer.tokenizer_json, tokenizer.special_tokens_in_text)
    ids, offsets = reference.encode([*probes, *texts])
    reason = _difference(tokenizer, [*probes, *texts], ids, offsets)
    message = f"encoder tokenizers {version(name)}: {reason}"
    if reason is None:
        name = "fastokens"
        message = (
            f"encoder fastokens {version(name)}: same ids as tokenizers {version('tokenizers')} "
            f"on {len(probes)} probes and {len(texts)} documents"
        )
    first_ids = ids[offsets[len(probes)] :]
    num_bytes = sum(len(text.encode()) for text in texts)
    if len(first_ids):
        message += f"; {num_bytes / len(first_ids):.2f} bytes per token on the first documents"
    messages = [message]
    num_token_bytes = int(tokenizer.token_bytes[first_ids].sum(dtype=np.int64))
    if num_token_bytes != num_bytes:
        messages.append(
            f"this tokenizer changes text: its tokens stand for {num_token_bytes:,} bytes where "
            f"the first documents have {num_bytes:,}; bits per byte counts the bytes of the tokens"
        )
    return EncoderChoice(name=name, version=version(name), messages=messages)


class EncoderCheck:
    """Compares an encoder with the reference on the first documents of every file of a task."""

    def __init__(
        self, name: str, tokenizer_json: str, special_tokens_in_text: bool = False
    ) -> None:
        self._name = name
        self._encoder = build_encoder(name, tokenizer_json, special_tokens_in_text)
        self._reference = build_reference(tokenizer_json, special_tokens_in_text)
        self._file: str | None = None
        self._file_characters = 0
        self._task_characters = 0 if name == "tokenizers" else CHECKED_TASK_CHARACTERS

    def check(self, file: str, document_id: str, text: str) -> None:
        """Compare the beginning of a document, if enough of its file was not compared before.

        Args:
            file: Name of the file; the documents of a file come one behind the other.
            document_id: Names the document in a message.
            text: The document.

        Raises:
            EncoderMismatch: The ids differ; all that the task encodes must be done again by
                `tokenizers`.
        """
        if file != self._file:
            self._file, self._file_characters = file, CHECKED_FILE_CHARACTERS
        text = text[: min(self._file_characters, self._task_characters)]
        if not text:
            return
        self._file_characters -= len(text)
        self._task_characters -= len(text)
        found, _ = self._encoder.encode([text])
        expected, _ = self._reference.encode([text])
        if not np.array_equal(found, expected):
            raise EncoderMismatch(
                f"encoder tokenizers {version('tokenizers')} takes over: {self._name} "
                f"{version(self._name)} gives {self._show_difference(found, expected)} of "
                f"document {document_id!r} in {file}"
            )

    def _show_difference(self, found: UInt32Array, expected: UInt32Array) -> str:
        common = min(len(found), len(expected))
        equal = found[:common] == expected[:common]
        place = common if equal.all() else int(equal.argmin())
        shown, right = (
            f"{ids[place]} ({self._reference.tokenizer.id_to_token(int(ids[place]))!r})"
            if place < len(ids)
            else "no token"
            for ids in (found, expected)
        )
        return f"{shown} instead of {right} as token {place}"


def _own_probes(tokenizer: TokenizerFacts) -> list[str]:
    """Put each added token in text; libraries resolve tokens within tokens differently."""
    return list(
        chain.from_iterable((c, f"a{c}b", f" {c} \n{c}{c}") for c in tokenizer.added_tokens)
    )


def _difference(
    tokenizer: TokenizerFacts,
    texts: list[str],
    expected_ids: UInt32Array,
    expected_offsets: Int64Array,
) -> str | None:
    """Say why the fast encoder cannot be used, or None when it can."""
    try:
        fast = FastEncoder(tokenizer.tokenizer_json, tokenizer.special_tokens_in_text)
    except ImportError:
        return "fastokens is not installed"
    except (ValueError, RuntimeError, NotImplementedError) as exc:
        return f"fastokens cannot read this tokenizer ({exc})"
    ids, offsets = fast.encode(texts)
    if np.array_equal(ids, expected_ids) and np.array_equal(offsets, expected_offsets):
        return None
    return "fastokens gives other ids on the probes or the first documents"
