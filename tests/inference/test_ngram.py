"""The n-gram model against its definition, written with dictionaries and sums."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.inference.ngram import ALPHABET_SIZE, ByteNgram

DOCUMENTS = [b"abracadabra", b"a cab, a bar", b"\xe2\x82\xac euro \xff", b"aaa"]


class PlainKneserNey:
    """Chen and Goodman's interpolated formula, one byte at a time."""

    def __init__(self, documents: list[bytes], order: int) -> None:
        borders = b"\0" * max(order - 1, 1)
        text = b"\0" * (order - 1) + b"".join(d + borders for d in documents)
        self.order = order
        self.counts: dict[int, Counter[bytes]] = {
            order: Counter(text[i : i + order] for i in range(len(text) - order + 1))
        }
        for n in range(order - 1, 0, -1):
            # Different bytes that stand before the n-gram.
            before: defaultdict[bytes, set[int]] = defaultdict(set)
            for gram in self.counts[n + 1]:
                before[gram[1:]].add(gram[0])
            self.counts[n] = Counter({gram: len(found) for gram, found in before.items()})

    def probability(self, context: bytes, byte: int, n: int | None = None) -> float:
        n = self.order if n is None else n
        if n == 0:
            return 1 / 256
        context = context[len(context) - (n - 1) :]
        counts = self.counts[n]
        ones = sum(c == 1 for c in counts.values())
        twos = sum(c == 2 for c in counts.values())
        discount = ones / (ones + 2 * twos) if ones else 0.5
        following = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == context}
        lower = self.probability(context[1:], byte, n - 1)
        if not following:
            return lower
        total = sum(following.values())
        first = max(following.get(byte, 0) - discount, 0.0) / total
        return first + discount * len(following) / total * lower


def key(gram: bytes) -> int:
    return int.from_bytes(gram, "big")


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_probabilities_are_those_of_the_formula(order: int) -> None:
    model, plain = ByteNgram(DOCUMENTS, order), PlainKneserNey(DOCUMENTS, order)
    contexts = [b"\0" * 7, b"abracad", b"cab, a ", b"\xe2\x82\xac eur", b"unseen!", b"zzzzzza"]
    for context in (c[8 - order :] for c in contexts):
        keys = np.array([key(context + bytes([b])) for b in range(256)], dtype=np.uint64)
        found = model.probabilities(keys)
        expected = [plain.probability(context, b) for b in range(256)]
        assert found == pytest.approx(expected, rel=1e-12)
        assert found.sum() == pytest.approx(1.0)


def test_bits_per_byte_are_summed_over_bytes_of_the_text_alone() -> None:
    model, plain = ByteNgram(DOCUMENTS, 3), PlainKneserNey(DOCUMENTS, 3)
    texts = [b"a bra", b"", b"car"]
    bits = 0.0
    for text in texts:
        padded = b"\0\0" + text
        bits -= sum(
            math.log2(plain.probability(padded[i : i + 2], padded[i + 2])) for i in range(len(text))
        )
    assert model.bits_per_byte(texts) == pytest.approx(bits / 8)


def test_a_document_begins_alike_first_and_later() -> None:
    """What follows a whole context of borders is the first bytes of all documents."""
    model = ByteNgram([b"one", b"two", b"two", b"two"], 4)
    keys = np.array([key(b"\0\0\0" + bytes([b])) for b in b"ot"], dtype=np.uint64)
    p_o, p_t = model.probabilities(keys)
    assert 0.0 < p_o < 0.5 < p_t
    again = ByteNgram([b"two", b"", b"two", b"one", b"two"], 4)
    assert again.probabilities(keys) == pytest.approx([p_o, p_t], rel=1e-12)


def test_without_counts_of_one_a_lone_byte_costs_what_the_formula_says() -> None:
    """Order 1 over b"aa" and its border: counts a 2, border 1, so D = 1 / (1 + 2)."""
    model = ByteNgram([b"aa"], 1)
    p_a = (2 - 1 / 3) / 3 + (1 / 3) * 2 / 3 / ALPHABET_SIZE
    assert model.bits_per_byte([b"a"]) == pytest.approx(-math.log2(p_a))


def test_a_wrong_order_and_empty_text_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"order 9 is outside 1\.\.8"):
        ByteNgram(DOCUMENTS, 9)
    with pytest.raises(DataError, match="no text to count"):
        ByteNgram([], 3)
    with pytest.raises(DataError, match="no text to count"):
        ByteNgram([b"", b""], 3)
    with pytest.raises(DataError, match="no text to score"):
        ByteNgram(DOCUMENTS, 3).bits_per_byte([b""])
