"""Between text and token ids for inference; ids become text as soon as it is whole characters."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.data import TokenizerConfig
from pipeline.data.shards import TOKENIZER_NAME, ShardManifest
from pipeline.data.tokenizer import TokenizerFacts, load_tokenizer, parse_tokenizer
from pipeline.errors import DataError

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What a decoder shows for bytes that are no character, or not yet."""
MAX_WAITING_CHARACTERS = 3
"""Of a UTF-8 character of 4 bytes at most 3 can be there without the rest; decoders show one
`UNKNOWN` for all of them or one for each."""


class TextCodec:
    """Encodes and decodes with one tokenizer."""

    def __init__(self, facts: TokenizerFacts, end_of_document: str) -> None:
        """Take a loaded tokenizer.

        Args:
            facts: From `load_tokenizer`.
            end_of_document: The token that closes documents.
        """
        self.facts = facts
        self.end_of_document = end_of_document
        self._tokenizer = parse_tokenizer(facts.tokenizer_json, "the tokenizer")
        self._tokenizer.encode_special_tokens = not facts.special_tokens_in_text

    @property
    def sha256(self) -> str:
        """Tells tokenizers apart."""
        return hashlib.sha256(self.facts.tokenizer_json.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text, as `prepare` gives them, without an end of document."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of ids; special tokens are left out, as they stand for no text."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def num_bytes(self, ids: Sequence[int]) -> int:
        """Give the UTF-8 bytes that ids stand for; 0 for special tokens."""
        return int(self.facts.token_bytes[list(ids)].sum())


class TextStream:
    """Turns ids that come one by one into pieces of text that never end inside a character.

    A character that is not complete when the ids end is never shown.
    """

    def __init__(self, codec: TextCodec) -> None:
        """Begin with no text.

        Args:
            codec: Decodes.
        """
        self._codec = codec
        # Decoders treat the first token of a text differently, so ids whose text was shown stand
        # before those that wait.
        self._shown: list[int] = []
        self._waiting: list[int] = []
        self._num_shown_characters = 0

    def add(self, token_id: int) -> str:
        """Take the next id and give the text that it completes, which may be none."""
        self._waiting.append(token_id)
        text = self._codec.decode([*self._shown, *self._waiting])
        num_waiting = min(len(text) - len(text.rstrip(UNKNOWN)), MAX_WAITING_CHARACTERS)
        end = len(text) - num_waiting
        new = text[self._num_shown_characters : end]
        self._num_shown_characters = end
        if num_waiting == 0:
            self._shown, self._waiting = self._waiting, []
            self._num_shown_characters = len(self._codec.decode(self._shown))
        return new


def load_codec(prepared_dir: Path, manifest: ShardManifest, config: TokenizerConfig) -> TextCodec:
    """Load the tokenizer that shards were made with.

    Args:
        prepared_dir: Holds `tokenizer.json`.
        manifest: Of the shards.
        config: Whether text can name special tokens.

    Raises:
        DataError: The file is missing, no tokenizer, or not the one of the shards.
    """
    path = prepared_dir / TOKENIZER_NAME
    facts = load_tokenizer(path, manifest.end_of_document, config.special_tokens_in_text)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != manifest.tokenizer_sha256:
        raise DataError(
            f"{path} is not the tokenizer of these shards: its sha256 is {found[:12]}, the "
            f"manifest says {manifest.tokenizer_sha256[:12]}; prepare the data again"
        )
    return TextCodec(facts, manifest.end_of_document)
