"""Which encoder is taken, what it is compared on, and what the messages say."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from pipeline.config.data import TokenizerConfig
from pipeline.data.encoder_choice import (
    CHECKED_FILE_CHARACTERS,
    CHECKED_TASK_CHARACTERS,
    PROBES,
    EncoderCheck,
    EncoderMismatch,
    choose_encoder,
)
from pipeline.data.encoders import FastEncoder, ReferenceEncoder, build_encoder
from pipeline.data.exact_cuts import PATTERNS
from pipeline.data.tokenizer import TokenizerFacts, load_tokenizer, train_tokenizer

END = "<|endoftext|>"
HARD = [
    *PROBES,
    f"{END}{END} a{END}",
    "".join(map(chr, range(0x20, 0x3000))),
    "".join(map(chr, range(0x1F300, 0x1FB00))),
    " \n".join(["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T", "'\u017fx"]),
]
ENCODERS = [ReferenceEncoder, FastEncoder]


@pytest.fixture(scope="module")
def texts(make_documents: Callable[[int], list[dict[str, str]]]) -> list[str]:
    return [document["text"] for document in make_documents(30)]


@pytest.fixture(scope="module")
def trained(texts: list[str]) -> TokenizerFacts:
    return train_tokenizer(texts, TokenizerConfig(vocab_size=300))


def reload(
    trained: TokenizerFacts,
    path: Path,
    change: Callable[[Tokenizer], object],
    special_tokens_in_text: bool = False,
) -> TokenizerFacts:
    tokenizer = Tokenizer.from_str(trained.tokenizer_json)
    change(tokenizer)
    tokenizer.save(str(path / "tokenizer.json"))
    return load_tokenizer(path / "tokenizer.json", END, special_tokens_in_text)


@pytest.fixture
def differing(trained: TokenizerFacts, tmp_path: Path) -> TokenizerFacts:
    """Two added tokens that overlap in "foobar": `tokenizers` looks for those first that are not
    normalized, `fastokens` for the leftmost."""
    return reload(
        trained,
        tmp_path,
        lambda t: t.add_tokens(
            [AddedToken("foob", normalized=True), AddedToken("bar", normalized=False)]
        ),
    )


def assert_equal_ids(facts: TokenizerFacts, texts: list[str]) -> None:
    arguments = facts.tokenizer_json, facts.special_tokens_in_text
    expected = ReferenceEncoder(*arguments).encode(texts)
    found = FastEncoder(*arguments).encode(texts)
    assert np.array_equal(expected[0], found[0])
    assert np.array_equal(expected[1], found[1])


def test_the_fast_encoder_equals_the_reference_on_hard_strings(
    trained: TokenizerFacts, texts: list[str]
) -> None:
    assert_equal_ids(trained, HARD + texts)
    choice = choose_encoder(trained, texts)
    assert choice.name == "fastokens"
    assert len(choice.messages) == 1


def test_the_choice_tells_the_bytes_per_token(trained: TokenizerFacts, texts: list[str]) -> None:
    num_tokens = len(ReferenceEncoder(trained.tokenizer_json).encode(texts)[0])
    num_bytes = len("".join(texts).encode())
    (message,) = choose_encoder(trained, texts).messages
    assert f"; {num_bytes / num_tokens:.2f} bytes per token on the first documents" in message
    (message,) = choose_encoder(trained, []).messages
    assert "bytes per token" not in message


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("in_text", [False, True])
def test_special_tokens_in_text_are_found_where_the_config_says_so(
    trained: TokenizerFacts,
    tmp_path: Path,
    encoder: type[ReferenceEncoder | FastEncoder],
    in_text: bool,
) -> None:
    facts = reload(
        trained,
        tmp_path,
        lambda t: (t.add_special_tokens(["<pad>"]), t.add_tokens(["<tool>"])),
        in_text,
    )
    ids, _ = encoder(facts.tokenizer_json, in_text).encode([f"a{END}b <pad><tool>"])
    assert (facts.end_of_document_id in ids) == in_text
    assert (300 in ids) == in_text
    assert 301 in ids, "an added token that is not special is one of the text's in both modes"
    assert_equal_ids(facts, [*HARD, f"a{END}b <pad><tool><pad{END}"])
    assert choose_encoder(facts, []).name == "fastokens"


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_the_long_s_and_the_vowel_separator_are_encoded_as_by_the_reference(
    trained: TokenizerFacts, tmp_path: Path, pattern: str
) -> None:
    facts = reload(
        trained,
        tmp_path,
        lambda t: setattr(
            t,
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(pattern), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        ),
    )
    assert_equal_ids(facts, ["ship'\u017fea said", "ship", "a \u180e\u180ethe \u180e1", *HARD])
    assert choose_encoder(facts, ["ship'\u017fea"]).name == "fastokens"


def test_tokens_within_tokens_are_probed(trained: TokenizerFacts, tmp_path: Path) -> None:
    facts = reload(
        trained,
        tmp_path,
        lambda t: (t.add_special_tokens(["<mask>"]), t.add_tokens(["mask>"])),
    )
    choice = choose_encoder(facts, [])
    assert choice.name == "tokenizers"
    assert "fastokens gives other ids on the probes" in choice.messages[0]


def test_a_difference_in_a_file_is_found_and_named(differing: TokenizerFacts) -> None:
    assert choose_encoder(differing, ["a ship"]).name == "fastokens"
    check = EncoderCheck("fastokens", differing.tokenizer_json)
    check.check("a.jsonl", "d1", "no word of it")
    check.check("b.jsonl", "d2", "a foo and a bar")
    with pytest.raises(
        EncoderMismatch,
        match=r"300 \('foob'\) instead of \d+ \('f'\) as token 3 of document 'd3' in b\.jsonl",
    ):
        check.check("b.jsonl", "d3", "no foobar")


def test_the_reference_is_not_compared_with_itself(differing: TokenizerFacts) -> None:
    with pytest.raises(EncoderMismatch):
        EncoderCheck("fastokens", differing.tokenizer_json).check("b.jsonl", "d3", "foobar")
    reference = EncoderCheck("tokenizers", differing.tokenizer_json)
    assert reference.check("b.jsonl", "d3", "foobar") is None


def test_only_the_first_documents_of_a_file_are_compared(differing: TokenizerFacts) -> None:
    check = EncoderCheck("fastokens", differing.tokenizer_json)
    check.check("a.jsonl", "d1", "x" * CHECKED_FILE_CHARACTERS + "foobar")
    check.check("a.jsonl", "d2", "foobar")
    with pytest.raises(EncoderMismatch):
        check.check("b.jsonl", "d1", "foobar")
    check = EncoderCheck("fastokens", differing.tokenizer_json)
    for i in range(CHECKED_TASK_CHARACTERS // CHECKED_FILE_CHARACTERS):
        check.check(f"{i}.jsonl", "d1", "x" * CHECKED_FILE_CHARACTERS)
    check.check("last.jsonl", "d1", "foobar")


def test_a_long_document_is_cut_by_what_build_encoder_gives(trained: TokenizerFacts) -> None:
    text = "ship sea\nHolmes said " * 60_000
    whole, _ = FastEncoder(trained.tokenizer_json).encode([text])
    ids, offsets = build_encoder("fastokens", trained.tokenizer_json).encode(["a", text, "b"])
    assert np.array_equal(ids[1:-1], whole)
    assert offsets.tolist() == [0, 1, len(whole) + 1, len(whole) + 2]


def word_pieces() -> Tokenizer:
    """A lower-casing WordPiece: it changes text."""
    words = ["[UNK]", END, "the", "cat", "##s", "s", "t", "##t"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([END, "[UNK]"])
    return tokenizer


def word_level() -> Tokenizer:
    """Whole words, which changes text, too."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END, "[UNK]"])
    return tokenizer


def unigram() -> Tokenizer:
    """SentencePiece with bytes for what no piece holds: only the space in front is new."""
    pieces = [("<unk>", 0.0), ("\u2581the", -2.0), ("\u2581", -3.0), ("cat", -4.0)]
    pieces += [(f"<0x{byte:02X}>", -10.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([END, "<unk>"])
    return tokenizer


@pytest.mark.parametrize(
    ("build", "text", "num_token_bytes"),
    [
        (word_pieces, "the\n\n\ncat", 8),  # a WordPiece decoder puts one space before each word
        (word_level, "the\n\n\ncat", 8),  # and so does the lack of a decoder
        (unigram, "the cat \u00fc", 11),  # a space in front; the bytes of u umlaut are two tokens
    ],
)
def test_a_tokenizer_of_another_kind_falls_back_and_says_what_it_does_to_text(
    tmp_path: Path, build: Callable[[], Tokenizer], text: str, num_token_bytes: int
) -> None:
    build().save(str(tmp_path / "tokenizer.json"))
    facts = load_tokenizer(tmp_path / "tokenizer.json", END)
    choice = choose_encoder(facts, [text])
    assert choice.name == "tokenizers"
    assert "fastokens cannot read this tokenizer" in choice.messages[0]
    assert (
        f"its tokens stand for {num_token_bytes} bytes where the first documents have "
        f"{len(text.encode())}" in choice.messages[1]
    )
    ids, _ = build_encoder("tokenizers", facts.tokenizer_json).encode([f"the{END}"])
    assert facts.end_of_document_id not in ids
