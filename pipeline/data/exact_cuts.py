r"""From a long text to pieces that can be encoded one by one, with the ids of the whole.

Memory then follows the piece, not the document. There are two kinds of cut, where V is a letter, a
digit, `_` or visible ASCII, and W a letter or digit: between V and a space (V| ), and between a
single line feed and W (V\n|W). The ids of both sides, one behind the other, are those of the whole
for the tokenizers that `cuts_are_exact` accepts, because nothing in them looks across a cut:

- Added tokens are found first. No added token holds a character other than whitespace before a
  space, or a line feed before such a character, so none lies across a cut; none that can be found
  in text takes whitespace at its sides or asks for its neighbours.
- NFC cannot change the text across a cut: a line feed and a space are starters that combine with
  nothing (Unicode Standard Annex 15, section 9.1), and what stands left of them is complete.
- Words are matched from left to right, and every character belongs to one. In all `PATTERNS` a
  space stands only at the beginning of a word or in a word of whitespace alone, so a word ends
  between V and a space. A line feed stands only at the end of a word, or in one of whitespace
  alone, which no W continues: a word ends between line feed and W, too. What is left of a cut is
  matched as before: the only look ahead, `\s+(?!\S)`, sees V at most; or it judges the one line
  feed before the cut, which is a word (or the last character of one) whatever it finds. What is
  right of a cut is matched as before, for no pattern looks behind.
- `Digits` splits by the kind of each character alone, and BPE without dropout encodes each word by
  itself.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

PIECE_CHARACTERS = 1 << 20
"""A piece ends at the first cut behind these; the reference takes some 200 bytes a character."""

CUT = re.compile(r"[\w!-~](?:(?= )|\n(?=[^\W_]))")
"""Matches up to the place of a cut."""

PATTERNS = frozenset(
    {
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # GPT-4 (cl100k)
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        # Llama 3, and GPT-4 as Hugging Face writes it
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen 2
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # GPT-4o (o200k)
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
"""The patterns that the cuts are proved for.

Source: openai/tiktoken, tiktoken_ext/openai_public.py; the tokenizer.json of Meta-Llama-3-8B and
Qwen2-7B.
"""

ACROSS_A_CUT = re.compile(r"\S |\n\S")
"""What an added token must not hold."""


def cuts_are_exact(tokenizer_json: str, special_tokens_in_text: bool = False) -> bool:
    """Tell whether pieces of a text give the ids of the whole; see the head of this module.

    Args:
        tokenizer_json: A `tokenizer.json` without truncation.
        special_tokens_in_text: Whether special tokens are looked for in text.
    """
    tokenizer = json.loads(tokenizer_json)
    normalizer = tokenizer["normalizer"]
    model = tokenizer["model"]
    return (
        (normalizer is None or normalizer == {"type": "NFC"})
        and _ends_words_at_cuts(tokenizer["pre_tokenizer"])
        and model["type"] == "BPE"
        and not model["dropout"]
        and all(_stays_aside(t, special_tokens_in_text) for t in tokenizer["added_tokens"])
    )


def _ends_words_at_cuts(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if parts and parts[0]["type"] == "Digits":
        parts = parts[1:]
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return False
    if len(parts) == 1:
        return bool(parts[0]["use_regex"])
    return not parts[-1]["use_regex"] and len(parts) == 2 and _is_known_split(parts[0])


def _is_known_split(part: dict[str, Any]) -> bool:
    return (
        part["type"] == "Split"
        and part["pattern"].get("Regex") in PATTERNS
        and part["behavior"] == "Isolated"
        and not part["invert"]
    )


def _stays_aside(token: dict[str, Any], special_tokens_in_text: bool) -> bool:
    # A special token that is not to be found still hides the ordinary ones that it overlaps.
    for content in (token["content"], unicodedata.normalize("NFC", token["content"])):
        if ACROSS_A_CUT.search(content):
            return False
    is_found = special_tokens_in_text or not token["special"]
    return not (is_found and (token["lstrip"] or token["rstrip"] or token["single_word"]))


def cut_exactly(parts: Iterable[str], piece_characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield the pieces of a text, each ending at the first cut behind `piece_characters`.

    Args:
        parts: The text, whole or in parts, which may end anywhere.
        piece_characters: Size of a piece, about.
    """
    text = ""
    for part in parts:
        text, start = text + part, 0
        while len(text) - start > piece_characters:
            found = CUT.search(text, start + piece_characters - 1)
            if found is None:
                break
            yield text[start : found.end()]
            start = found.end()
        text = text[start:]
    if text:
        yield text
