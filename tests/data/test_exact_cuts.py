"""Pieces of a text give the ids of the whole, for every kind of tokenizer that is cut."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from pipeline.config.data import TokenizerConfig
from pipeline.data.encoder_choice import PROBES
from pipeline.data.encoders import (
    Encoder,
    FastEncoder,
    PiecewiseEncoder,
    ReferenceEncoder,
    build_encoder,
)
from pipeline.data.exact_cuts import PATTERNS, cut_exactly, cuts_are_exact
from pipeline.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
WORDS = {**BYTE_LEVEL, "use_regex": True}
SPLITS: dict[str, dict[str, Any]] = {
    "byte level": WORDS,
    "digits": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, WORDS],
    },
    **{
        pattern: {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**BYTE_LEVEL, "use_regex": False},
            ],
        }
        for pattern in sorted(PATTERNS)
    },
}
ENCODERS: list[type[ReferenceEncoder | FastEncoder]] = [ReferenceEncoder, FastEncoder]
ATOMS = [
    *PROBES,
    *["a", "b ", " c", "d\ne", "f\n", "\nG", " ", "  ", "\n", "\n\n", "\r\n", "\r", "\t", "/"],
    *["it's", "'s", "'S", "'\u017ft", "DON'T", "12", "3456", "1,000", "\u0663", "_", "-", "."],
    *["e\u0301", "\u0301", "\u00a0", "\u2003", "\u2028", "\x85", "\x1c", "\u180e", "\u200b"],
    *["\u4e2d\u6587", "\u3002\n", "\u3002", "\u4e2d\n\u6587", "\u1100\u1161", "\U0001f44d"],
    *[
        "<|endoftext|>",
        "<pad>",
        "ship sea",
        "Holmes said",
        "x\ny",
        "x\n y",
        "x \ny",
        "\n'",
        "\u01c5",
    ],
]


@cache
def tokenizer_of(split: str, normalizer: str | None = None) -> str:
    """Build a tokenizer that merges every pair of its commonest bytes, so that ids show words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    text = "".join(ATOMS[len(PROBES) :])
    (common, _), *_ = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
    pairs = [[a, b] for a in sorted(set(common)) for b in sorted(set(common))]
    vocabulary = ["<|endoftext|>", *letters, *("".join(pair) for pair in pairs)]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [added_token(0, "<|endoftext|>", special=True)],
            "normalizer": normalizer and {"type": normalizer},
            "pre_tokenizer": SPLITS[split],
            "post_processor": None,
            "decoder": {**BYTE_LEVEL, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: i for i, token in enumerate(vocabulary)},
                "merges": pairs,
            },
        }
    )


def added_token(token_id: int, content: str, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": token_id, "content": content, **dict.fromkeys(names, False), **flags}


def fuzz(num_texts: int, num_atoms: int) -> list[str]:
    generator = random.Random(3)
    return ["".join(generator.choices(ATOMS, k=num_atoms)) for _ in range(num_texts)]


def assert_equal_ids(whole: Encoder, pieces: Encoder, texts: list[str]) -> None:
    expected_ids, expected_offsets = whole.encode(texts)
    ids, offsets = pieces.encode(texts)
    assert np.array_equal(offsets, expected_offsets)
    assert np.array_equal(ids, expected_ids)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("split", SPLITS)
def test_pieces_give_the_ids_of_the_whole(split: str, encoder: type[Encoder]) -> None:
    tokenizer_json = tokenizer_of(split, "NFC" if "Lu" in split else None)
    assert cuts_are_exact(tokenizer_json)
    whole = encoder(tokenizer_json)  # type: ignore[call-arg]
    texts = fuzz(60, 40)
    for piece_characters in (1, 2, 7, 50):
        assert_equal_ids(whole, PiecewiseEncoder(whole, piece_characters), texts)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_special_tokens_in_text_stand_in_pieces_as_in_the_whole(encoder: type[Encoder]) -> None:
    tokenizer_json = tokenizer_of("byte level", "NFC")
    assert cuts_are_exact(tokenizer_json, special_tokens_in_text=True)
    whole = encoder(tokenizer_json, True)  # type: ignore[call-arg]
    texts = fuzz(60, 40)
    assert 0 in whole.encode(texts)[0]
    for piece_characters in (1, 7):
        assert_equal_ids(whole, PiecewiseEncoder(whole, piece_characters), texts)


def test_both_kinds_of_cut_are_made_and_nothing_is_lost() -> None:
    text = "ab cd  ef\ngh\n\nij\n kl.\nmn\u3002\n\u4e2d\n\u6587 \U0001f44d op"
    pieces = list(cut_exactly([text], 1))
    assert pieces == [
        *["ab", " cd", "  ef\n", "gh\n\nij\n kl.\n", "mn\u3002\n\u4e2d\n"],
        "\u6587",
        " \U0001f44d op",
    ]
    assert "".join(pieces) == text


def test_a_piece_ends_at_the_first_cut_behind_its_size() -> None:
    assert list(cut_exactly(["aaaa bbbb cccc dddd"], 7)) == ["aaaa bbbb", " cccc dddd"]
    assert list(cut_exactly(["a" * 100 + " b"], 7)) == ["a" * 100, " b"]
    assert list(cut_exactly([" " * 100], 7)) == [" " * 100]


@pytest.mark.parametrize("split", SPLITS)
def test_other_cuts_change_the_ids(split: str) -> None:
    encoder = ReferenceEncoder(tokenizer_of(split))
    for text in fuzz(20, 40):
        (whole, _), starts = encoder.encode([text]), range(0, len(text), 5)
        pieces, _ = encoder.encode([text[start : start + 5] for start in starts])
        assert not np.array_equal(pieces, whole)


def test_real_text_is_cut_without_a_change() -> None:
    text = (ROOT / "pipeline/data/corpus/tinyshakespeare.txt").read_text()
    facts = train_tokenizer([text[:200_000]], TokenizerConfig(vocab_size=2000))
    for encoder in ENCODERS:
        whole = encoder(facts.tokenizer_json)
        assert_equal_ids(whole, PiecewiseEncoder(whole, 1000), [text[:300_000], "short", ""])


def changed(change: Callable[[dict[str, Any]], object], split: str = "byte level") -> str:
    tokenizer = json.loads(tokenizer_of(split))
    change(tokenizer)
    Tokenizer.from_str(json.dumps(tokenizer))
    return json.dumps(tokenizer)


LLAMA = next(pattern for pattern in sorted(PATTERNS) if pattern.startswith("(?i:'s|'t"))
UNSAFE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no words": lambda t: t.update(pre_tokenizer=None),
    "prefix space": lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
    "one word": lambda t: t["pre_tokenizer"].update(use_regex=False),
    "metaspace": lambda t: t.update(
        pre_tokenizer={
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "always",
            "split": True,
        }
    ),
    "compatibility": lambda t: t.update(normalizer={"type": "NFKC"}),
    "prepend": lambda t: t.update(normalizer={"type": "Prepend", "prepend": "_"}),
    "dropout": lambda t: t["model"].update(dropout=0.1),
    "word level": lambda t: t.update(
        model={"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "a"}
    ),
    "token across a space": lambda t: t["added_tokens"].append(added_token(9, "a b")),
    "token across a line": lambda t: t["added_tokens"].append(added_token(9, "\nb")),
    "special token across a space": lambda t: t["added_tokens"].append(
        added_token(9, "<| a|>", special=True)
    ),
    "token that takes spaces": lambda t: t["added_tokens"].append(
        added_token(9, "<m>", rstrip=True)
    ),
    "token that is a word": lambda t: t["added_tokens"].append(
        added_token(9, "<m>", single_word=True)
    ),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_a_tokenizer_outside_the_proof_is_not_cut(name: str) -> None:
    tokenizer_json = changed(UNSAFE[name])
    assert cuts_are_exact(tokenizer_of("byte level"))
    assert not cuts_are_exact(tokenizer_json)
    assert isinstance(build_encoder("tokenizers", tokenizer_json), ReferenceEncoder)


@pytest.mark.parametrize(
    "change",
    [{"pattern": {"Regex": r"\w+ \w+"}}, {"behavior": "Removed"}, {"invert": True}],
    ids=str,
)
def test_a_split_outside_the_proof_is_not_cut(change: dict[str, Any]) -> None:
    split = "pretokenizers"
    assert not cuts_are_exact(changed(lambda t: t["pre_tokenizer"][split][0].update(change), LLAMA))


def test_a_special_token_that_takes_spaces_matters_only_where_it_is_found() -> None:
    tokenizer_json = changed(
        lambda t: t["added_tokens"].append(added_token(9, "<m>", lstrip=True, special=True))
    )
    assert cuts_are_exact(tokenizer_json)
    assert not cuts_are_exact(tokenizer_json, special_tokens_in_text=True)


PEAK_OF_ONE_DOCUMENT = """
import sys
from pathlib import Path
from pipeline.data.encoders import build_encoder

def status_bytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

encoder = build_encoder("fastokens", Path(sys.argv[1]).read_text())
encoder.encode(["warm up"])
text = ("a ship at sea, and Holmes said: don't! \\n" * 5_000_000)[:200_000_000]
before = status_bytes("VmRSS")
ids, _ = encoder.encode([text])
print(status_bytes("VmHWM"), status_bytes("VmHWM") - before - ids.nbytes, ids.nbytes)
"""


@pytest.mark.slow
def test_a_document_of_200_mb_is_encoded_in_little_more_than_text_and_ids(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_of("byte level"))
    shown = subprocess.run(
        [sys.executable, "-c", PEAK_OF_ONE_DOCUMENT, str(path)],
        cwd=ROOT,
        env={"RAYON_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    peak_bytes, extra_bytes, id_bytes = map(int, shown.stdout.split())
    assert id_bytes > 200_000_000
    assert peak_bytes < 1_500_000_000
    assert extra_bytes < 100_000_000


@pytest.mark.parametrize("encoder_class", ENCODERS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_parts_that_end_anywhere_give_the_ids_of_the_whole(
    encoder_class: type[ReferenceEncoder | FastEncoder], size: int
) -> None:
    whole = encoder_class(tokenizer_of("byte level"))
    text = "".join(ATOMS) * 3
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    (expected, _), piecewise = whole.encode([text]), PiecewiseEncoder(whole, 40)
    found = list(piecewise.encode_parts(parts))
    assert len(found) > 5
    assert np.array_equal(np.concatenate(found), expected)
    assert np.array_equal(np.concatenate(list(whole.encode_parts(parts))), expected)
