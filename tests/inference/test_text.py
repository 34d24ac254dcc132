import pytest

from pipeline.inference.text import UNKNOWN, TextCodec, TextStream
from tests.inference.cases import END, TEXTS, tiny_tokenizer

FACTS = tiny_tokenizer()
CODEC = TextCodec(FACTS, END)


def ids_of_bytes(data: bytes) -> list[int]:
    """The ids of single bytes, which a byte-level vocabulary always has."""
    from tokenizers import Tokenizer, pre_tokenizers

    vocabulary = Tokenizer.from_str(FACTS.tokenizer_json).get_vocab()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The alphabet maps printable bytes to themselves and the others, in order, to 256 and up.
    others = [b for b in range(256) if chr(b) not in alphabet]
    return [vocabulary[chr(b) if chr(b) in alphabet else chr(256 + others.index(b))] for b in data]


@pytest.mark.parametrize("text", [*TEXTS, "", "  two  spaces \n\n\ttab", "\x00\x7f", "👩‍👩‍👧 ñ"])
def test_text_survives_and_bytes_add_up(text: str) -> None:
    ids = CODEC.encode(text)
    assert CODEC.decode(ids) == text
    assert CODEC.num_bytes(ids) == len(text.encode())
    assert FACTS.end_of_document_id not in ids


@pytest.mark.parametrize("text", [*TEXTS, "naïve 日本語 😀😀", "€"])
def test_a_stream_gives_the_text_byte_by_byte_without_half_characters(text: str) -> None:
    stream = TextStream(CODEC)
    pieces = [stream.add(token_id) for token_id in ids_of_bytes(text.encode())]
    assert UNKNOWN not in "".join(pieces)
    assert "".join(pieces) == text
    # A character comes with its last byte and no later.
    shown = ""
    for end, piece in enumerate(pieces, start=1):
        shown += piece
        assert shown == text.encode()[:end].decode(errors="ignore")


def test_a_stream_of_whole_tokens_gives_the_text() -> None:
    stream = TextStream(CODEC)
    text = " ".join(TEXTS)
    assert "".join(stream.add(token_id) for token_id in CODEC.encode(text)) == text


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"a\x80b", "a\N{REPLACEMENT CHARACTER}b"),
        (b"\x80\xf0\x9f\x98\x80.", "\N{REPLACEMENT CHARACTER}😀."),
        (b"\xe2\x82x", "\N{REPLACEMENT CHARACTER}x"),
        (b"\xff\xff\xff\xff\xff\xffz", 6 * UNKNOWN + "z"),
        (b"end \xf0\x9f\x98", "end "),
    ],
)
def test_bytes_that_are_no_character_are_shown_once_they_cannot_become_one(
    data: bytes, shown: str
) -> None:
    stream = TextStream(CODEC)
    assert "".join(stream.add(token_id) for token_id in ids_of_bytes(data)) == shown
