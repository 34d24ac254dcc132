"""The encoder of `tokenizers`, for the peers and for the ids that all are compared with."""

from functools import lru_cache
from typing import Any


def encode_by_reference(tokenizer: str, texts: list[str]) -> list[list[int]]:
    """Encode with `tokenizers`, no special token added.

    Args:
        tokenizer: Path of a `tokenizer.json`.
        texts: Documents.
    """
    encodings = _load(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


@lru_cache(maxsize=1)
def _load(tokenizer: str) -> Any:
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(tokenizer)
    loaded.encode_special_tokens = True
    return loaded
