"""Training, ids, bytes per token, and tokenizers that must be refused."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pipeline.config.data import TokenizerConfig
from pipeline.data.encoder_choice import PROBES
from pipeline.data.encoders import FastEncoder, ReferenceEncoder
from pipeline.data.tokenizer import (
    COUNTED_CHARACTERS,
    TokenizerFacts,
    bound_words,
    load_tokenizer,
    train_tokenizer,
)
from pipeline.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
END = "<|endoftext|>"
HARD = [
    *PROBES,
    f"{END}{END} a{END}",
    "".join(map(chr, range(0x20, 0x3000))),
    "".join(map(chr, range(0x1F300, 0x1FB00))),
    " \n".join(["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T"]),
]


@pytest.fixture(scope="module")
def texts(make_documents: Callable[[int], list[dict[str, str]]]) -> list[str]:
    return [document["text"] for document in make_documents(30)]


@pytest.fixture(scope="module")
def trained(texts: list[str]) -> TokenizerFacts:
    return train_tokenizer(texts, TokenizerConfig(vocab_size=300))


def save(tokenizer: Tokenizer, path: Path) -> Path:
    tokenizer.save(str(path))
    return path


def word_pieces(path: Path) -> Path:
    """A lower-casing WordPiece of eight entries: nothing here is byte-level."""
    words = ["[UNK]", "[SEP]", "the", "cat", "##s", "s", "t", "##t"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[SEP]", "[UNK]"])
    return save(tokenizer, path)


def test_training_fills_the_vocabulary_and_is_repeatable(
    trained: TokenizerFacts, texts: list[str]
) -> None:
    again = train_tokenizer(iter(texts), TokenizerConfig(vocab_size=300))
    assert trained.vocab_size == len(trained.token_bytes) == 300
    assert trained.tokenizer_json == again.tokenizer_json


def test_training_text_ends_where_its_different_words_are_too_many() -> None:
    texts = ["ship sea", "sea \u00fc ship", "one two", "ship"]
    assert list(bound_words(texts, 9)) == [*texts[:2], ""]
    assert list(bound_words(texts, 15)) == texts
    repeated = "a " * COUNTED_CHARACTERS
    assert list(bound_words([repeated + "other words", "ship"], 5)) == [repeated]


TRAINING = """
import hashlib, sys
from pathlib import Path
from pipeline.config.data import TokenizerConfig
from pipeline.data.tokenizer import train_tokenizer

text = Path("pipeline/data/corpus/tinyshakespeare.txt").read_text()[:300_000]
texts = [text[start : start + 5000] for start in range(0, len(text), 5000)]
facts = train_tokenizer(texts, TokenizerConfig(vocab_size=2048))
print(hashlib.sha256(facts.tokenizer_json.encode()).hexdigest())
"""


def test_training_gives_the_same_tokenizer_with_any_number_of_threads() -> None:
    shown = {
        subprocess.run(
            [sys.executable, "-c", TRAINING],
            cwd=ROOT,
            env={"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in (1, 8)
    }
    assert len(shown) == 1


@pytest.mark.parametrize("text", HARD)
def test_ids_decode_to_the_text(trained: TokenizerFacts, text: str) -> None:
    ids, _ = ReferenceEncoder(trained.tokenizer_json).encode([text])
    decoded = Tokenizer.from_str(trained.tokenizer_json).decode(
        ids.tolist(), skip_special_tokens=False
    )
    assert decoded == text


@pytest.mark.parametrize("encoder", [ReferenceEncoder, FastEncoder])
def test_bytes_per_id_add_up_to_the_bytes_of_the_text(
    trained: TokenizerFacts, encoder: type[ReferenceEncoder | FastEncoder]
) -> None:
    ids, offsets = encoder(trained.tokenizer_json).encode(HARD)
    for text, start, stop in zip(HARD, offsets[:-1], offsets[1:], strict=True):
        assert trained.token_bytes[ids[start:stop]].sum() == len(text.encode())


def test_the_end_of_document_stands_for_no_byte(trained: TokenizerFacts) -> None:
    assert trained.token_bytes[trained.end_of_document_id] == 0
    assert (np.delete(trained.token_bytes, trained.end_of_document_id) > 0).all()


@pytest.mark.parametrize("encoder", [ReferenceEncoder, FastEncoder])
def test_text_cannot_forge_the_end_of_a_document(
    trained: TokenizerFacts, encoder: type[ReferenceEncoder | FastEncoder]
) -> None:
    ids, _ = encoder(trained.tokenizer_json).encode([END, f"a {END} b"])
    assert len(ids) > 2
    assert trained.end_of_document_id not in ids


@pytest.mark.parametrize("encoder", [ReferenceEncoder, FastEncoder])
def test_no_texts_give_no_ids(
    trained: TokenizerFacts, encoder: type[ReferenceEncoder | FastEncoder]
) -> None:
    ids, offsets = encoder(trained.tokenizer_json).encode([])
    assert (len(ids), offsets.tolist()) == (0, [0])


def test_bytes_per_id_of_word_pieces_are_those_that_they_add(tmp_path: Path) -> None:
    facts = load_tokenizer(word_pieces(tmp_path / "t.json"), "[SEP]")
    assert facts.token_bytes.tolist() == [0, 0, 4, 4, 1, 2, 2, 1]


def test_a_saved_tokenizer_is_loaded_as_it_was(trained: TokenizerFacts, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(trained.tokenizer_json)
    loaded = load_tokenizer(tmp_path / "t.json", END)
    assert loaded.tokenizer_json == trained.tokenizer_json
    assert np.array_equal(loaded.token_bytes, trained.token_bytes)


def test_truncation_and_padding_of_a_loaded_tokenizer_are_off(
    trained: TokenizerFacts, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_str(trained.tokenizer_json)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    loaded = load_tokenizer(save(tokenizer, tmp_path / "t.json"), END)
    for encoder in (ReferenceEncoder, FastEncoder):
        ids, offsets = encoder(loaded.tokenizer_json).encode(["ship sea Holmes", "a"])
        assert loaded.token_bytes[ids].sum() == len("ship sea Holmes" + "a")
        assert len(offsets) == 3


def test_holes_in_the_ids_count_to_the_vocabulary(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: 2 * i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    facts = load_tokenizer(save(tokenizer, tmp_path / "t.json"), END)
    assert facts.vocab_size == 511
    assert facts.token_bytes.sum() == 255


def test_an_end_of_document_token_that_is_not_marked_special_is_made_so(
    trained: TokenizerFacts, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_str(trained.tokenizer_json)
    tokenizer.add_tokens([AddedToken("<eod>", special=False, normalized=False)])
    facts = load_tokenizer(save(tokenizer, tmp_path / "t.json"), "<eod>")
    for encoder in (ReferenceEncoder, FastEncoder):
        ids, _ = encoder(facts.tokenizer_json).encode(["a<eod>b"])
        assert facts.end_of_document_id not in ids


def test_an_ordinary_word_cannot_end_documents(trained: TokenizerFacts, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(trained.tokenizer_json)
    with pytest.raises(DataError, match="encodes the text 'a' in a document as its end-of-doc"):
        load_tokenizer(tmp_path / "t.json", "a")


def test_a_word_of_the_model_ends_documents_only_where_the_config_allows_it(
    tmp_path: Path,
) -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -3.0), ("a", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    path = save(tokenizer, tmp_path / "t.json")
    with pytest.raises(DataError, match=r"or allow it by .*special_tokens_in_text=true"):
        load_tokenizer(path, "</s>")
    facts = load_tokenizer(path, "</s>", special_tokens_in_text=True)
    assert facts.end_of_document_id == 1
    assert 1 in ReferenceEncoder(facts.tokenizer_json, True).encode(["a</s>"])[0]


def test_a_tokenizer_without_the_end_of_document_token_lists_its_special_tokens(
    trained: TokenizerFacts, tmp_path: Path
) -> None:
    (tmp_path / "t.json").write_text(trained.tokenizer_json)
    with pytest.raises(DataError, match=r"no end-of-document token '</s>'.*\['<\|endoftext\|>'\]"):
        load_tokenizer(tmp_path / "t.json", "</s>")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 3}', b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.json is not"):
        load_tokenizer(tmp_path / "t.json", END)
    with pytest.raises(DataError, match="cannot read tokenizer"):
        load_tokenizer(tmp_path / "nowhere.json", END)
