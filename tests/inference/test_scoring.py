import math
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError, DataError
from pipeline.inference.evaluate import (
    read_texts,
    score_documents,
    score_validation,
    split_documents,
)
from pipeline.inference.scoring import Window, rolling_windows, score_greedy, score_windows
from tests.inference.cases import TEXTS
from tests.inference.conftest import Made


def plain_log_likelihoods(model: torch.nn.Module, tokens: list[int], start: int) -> list[float]:
    """Of tokens[start:], by the softmax of one forward pass over all."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([tokens[:-1]]))[0].double()
    logs_TV = logits_TV.log_softmax(dim=1)
    return [float(logs_TV[i - 1, tokens[i]]) for i in range(start, len(tokens))]


@pytest.mark.parametrize(
    ("length", "context", "stride"),
    [(10, 4, 4), (10, 4, 1), (10, 4, 3), (10, 9, 5), (10, 20, 7), (2, 4, 2), (1, 4, 2), (14, 4, 2)],
)
def test_windows_score_each_token_but_the_first_once(
    length: int, context: int, stride: int
) -> None:
    tokens = list(range(length))
    windows = list(rolling_windows(tokens, context, stride))
    scored = [t for w in windows for t in w.tokens[len(w.tokens) - w.num_scored :]]
    assert scored == tokens[1:]
    for number, window in enumerate(windows):
        first = window.tokens[-window.num_scored]
        num_before = first - window.tokens[0]
        assert len(window.tokens) <= context + 1
        assert num_before >= (1 if number == 0 else min(first, context - stride + 1))


def test_windows_that_do_not_overlap_are_those_of_the_harness() -> None:
    """lm-evaluation-harness documents tokens 0..9, a prefix and 4 positions with these windows."""
    windows = list(rolling_windows([-1, *range(10)], 4, 4))
    assert [(list(w.tokens), w.num_scored) for w in windows] == [
        ([-1, 0, 1, 2, 3], 4),
        ([3, 4, 5, 6, 7], 4),
        ([5, 6, 7, 8, 9], 2),
    ]


def test_a_wrong_stride_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stride of 5 tokens is outside 1\.\.context"):
        list(rolling_windows([1, 2, 3], 4, 5))


def test_padding_and_batches_change_no_score(made: Made) -> None:
    windows = [
        Window(tokens=[5, 9, 1, 7, 3, 8], num_scored=2),
        Window(tokens=[4, 4], num_scored=1),
        Window(tokens=[8, 2, 6], num_scored=2),
    ]
    expected = [
        plain_log_likelihoods(made.model, list(w.tokens), len(w.tokens) - w.num_scored)
        for w in windows
    ]
    for batch_size in (1, 2, 3):
        found = score_windows(made.model, windows, batch_size)
        for own, plain in zip(found, expected, strict=True):
            assert own == pytest.approx(plain, abs=1e-5)
        sums = score_greedy(made.model, windows, batch_size, made.model.embedding_VD.shape[0])
        assert [s for s, _ in sums] == pytest.approx([sum(p) for p in expected], abs=1e-5)


def test_greedy_is_told_from_likely(made: Made) -> None:
    with torch.no_grad():
        best = int(made.model(torch.tensor([[5, 9]]))[0, -1].argmax())
    windows = [
        Window(tokens=[5, 9, best], num_scored=1),
        Window(tokens=[5, 9, best + 1], num_scored=1),
    ]
    scores = score_greedy(made.model, windows, 2, made.model.embedding_VD.shape[0])
    assert [greedy for _, greedy in scores] == [True, False]


def test_bits_per_byte_are_those_summed_by_hand(made: Made) -> None:
    """Each text alone: an end in front is context, one behind counts for the loss alone."""
    trained = made.load()
    end_id = trained.shards.end_of_document_id
    texts = ["A new moon", "日本語"]
    text_nats = all_nats = 0.0
    num_tokens = 0
    for text in texts:
        tokens = [end_id, *trained.codec.encode(text), end_id]
        likelihoods = plain_log_likelihoods(made.model, tokens, 1)
        all_nats -= sum(likelihoods)
        text_nats -= sum(likelihoods[:-1])
        num_tokens += len(likelihoods)
    score = score_documents(trained, texts, context_tokens=64, stride_tokens=32)
    assert score.num_documents == 2
    assert score.num_tokens == num_tokens
    assert score.text_bytes == 10 + 9
    assert score.loss == pytest.approx(all_nats / num_tokens, abs=1e-5)
    assert score.bits_per_byte == pytest.approx(text_nats / math.log(2) / 19, abs=1e-5)


def test_short_windows_score_what_each_of_them_sees(made: Made) -> None:
    trained = made.load()
    end_id = trained.shards.end_of_document_id
    tokens = [end_id, *trained.codec.encode(TEXTS[0]), end_id]
    nats = 0.0
    for window in rolling_windows(tokens, 8, 3):
        start = len(window.tokens) - window.num_scored
        nats -= sum(plain_log_likelihoods(made.model, list(window.tokens), start))
    score = score_documents(trained, [TEXTS[0]], context_tokens=8, stride_tokens=3)
    assert score.loss == pytest.approx(nats / (len(tokens) - 1), abs=1e-5)


def test_the_validation_split_is_scored_in_samples_as_in_training(made: Made) -> None:
    """Samples of 16 tokens one behind the other, each begun without context."""
    trained = made.load()
    facts = trained.codec.facts
    tokens = [i for text in TEXTS for i in (*trained.codec.encode(text), facts.end_of_document_id)]
    text_nats = nats = 0.0
    num_bytes = 0
    for start in range(0, len(tokens) - 1, 16):
        sample = tokens[start : start + 17]
        for token, likelihood in zip(
            sample[1:], plain_log_likelihoods(made.model, sample, 1), strict=True
        ):
            nats -= likelihood
            text_nats -= likelihood if facts.token_bytes[token] else 0.0
            num_bytes += int(facts.token_bytes[token])
    score = score_validation(trained)
    assert score.num_tokens == len(tokens) - 1
    assert score.loss == pytest.approx(nats / (len(tokens) - 1), abs=1e-5)
    assert score.bits_per_byte == pytest.approx(text_nats / math.log(2) / num_bytes, abs=1e-5)


def test_a_split_gives_its_documents_back(made: Made) -> None:
    assert list(split_documents(made.load(), "train")) == [text.encode() for text in TEXTS]


def test_files_are_read_as_the_documents_in_them(tmp_path: Path) -> None:
    (tmp_path / "whole.txt").write_text("one\n\ntwo\n")
    (tmp_path / "lines.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    texts = list(read_texts([tmp_path / "whole.txt", tmp_path / "lines.jsonl"]))
    assert texts == ["one\n\ntwo\n", "three", "four"]
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        list(read_texts([tmp_path / "bad.jsonl"]))
    with pytest.raises(DataError, match="nowhere"):
        list(read_texts([tmp_path / "nowhere.txt"]))


def test_text_without_a_token_or_context_beyond_the_model_is_refused(made: Made) -> None:
    trained = made.load()
    with pytest.raises(DataError, match="no token to score"):
        score_documents(trained, [], 16, 8)
    with pytest.raises(ConfigError, match=r"context of 65 tokens .*max_positions=64"):
        score_documents(trained, TEXTS, 65, 8)
