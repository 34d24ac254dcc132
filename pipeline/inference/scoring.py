"""From token sequences to the log-likelihood of their tokens, in windows that a model can hold.

Shapes: `B` windows of a batch, `T` time, `V` vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.batching import IGNORED_LABEL
from pipeline.errors import ConfigError
from pipeline.models.base import LanguageModel

Floats = npt.NDArray[np.float64]
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Window:
    """A run of tokens of which the last ones are scored, given those before them."""

    tokens: Sequence[int]
    """At least 2; the first is context only."""
    num_scored: int
    """At least 1, at most all but the first."""


def require_causal(model: LanguageModel) -> None:
    """Refuse a model that sees the tokens that it is to predict.

    Raises:
        ConfigError: It was trained with model.causal=false.
    """
    if not getattr(model.config, "causal", True):
        raise ConfigError(
            "model.causal=false sees the tokens that follow, so it can neither generate nor score "
            "a text; legal here: model.causal=true"
        )


def rolling_windows(
    tokens: Sequence[int], context_tokens: int, stride_tokens: int
) -> Iterator[Window]:
    """Cut a text into windows so that every token but the first is scored once.

    The first window scores all it holds; every later one begins `stride_tokens` further and scores
    what is new. So a token sees at least context_tokens - stride_tokens others before it, except
    near the beginning of the text, and the last window is as long as the others.

    Args:
        tokens: The text; its first token is context only.
        context_tokens: Tokens that the model reads at once.
        stride_tokens: Tokens that a window adds, 1 to `context_tokens`.

    Yields:
        Windows of at most context_tokens + 1 tokens, in order.

    Raises:
        ConfigError: The stride is out of range.
    """
    if not 1 <= stride_tokens <= context_tokens:
        raise ConfigError(
            f"stride of {stride_tokens} tokens is outside 1..context, with a context of "
            f"{context_tokens}"
        )
    scored = 1
    while scored < len(tokens):
        step = context_tokens if scored == 1 else stride_tokens
        stop = min(scored + step, len(tokens))
        start = max(0, stop - context_tokens - 1)
        yield Window(tokens=tokens[start:stop], num_scored=stop - scored)
        scored = stop


def in_batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Cut a sequence into parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def score_windows(model: LanguageModel, windows: Sequence[Window], batch_size: int) -> list[Floats]:
    """Give the log-likelihood of every scored token.

    Args:
        model: Set to evaluation, causal.
        windows: What to score.
        batch_size: Windows computed at once; longer ones first, so that padding is short.

    Returns:
        For each window, in the given order, nats of its scored tokens.
    """
    results: list[Floats] = [np.empty(0)] * len(windows)
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].tokens))
    for batch in in_batches(order, batch_size):
        chosen = [windows[index] for index in batch]
        inputs_BT, labels_BT = pad(chosen, model.embedding_VD.device)
        with torch.inference_mode():
            nll_BT = model(inputs_BT, labels_BT).double().cpu().numpy()
        for index, window, nll_T in zip(batch, chosen, nll_BT, strict=True):
            stop = len(window.tokens) - 1
            results[index] = -nll_T[stop - window.num_scored : stop]
    return results


def score_greedy(
    model: LanguageModel, windows: Sequence[Window], batch_size: int, vocab_size: int
) -> list[tuple[float, bool]]:
    """Give the log-likelihood of each window's scored tokens, and whether they are the likeliest.

    Args:
        model: Set to evaluation, causal.
        windows: What to score.
        batch_size: Windows computed at once.
        vocab_size: Ids that count as candidates for the likeliest.

    Returns:
        For each window, in the given order, the sum in nats, and whether temperature 0 would give
        exactly these tokens.
    """
    results: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].tokens))
    for batch in in_batches(order, batch_size):
        chosen = [windows[index] for index in batch]
        inputs_BT, _ = pad(chosen, model.embedding_VD.device)
        with torch.inference_mode():
            logits_BTV = model.logits(inputs_BT).float()
        for index, window, logits_TV in zip(batch, chosen, logits_BTV, strict=True):
            stop = len(window.tokens) - 1
            scored_TV = logits_TV[stop - window.num_scored : stop]
            wanted_T = torch.tensor(window.tokens[-window.num_scored :], device=logits_TV.device)
            likelihoods_T = scored_TV.log_softmax(dim=1).gather(1, wanted_T.unsqueeze(1))
            is_greedy = bool((scored_TV[:, :vocab_size].argmax(dim=1) == wanted_T).all())
            results[index] = float(likelihoods_T.double().sum()), is_greedy
    return results


def pad(windows: Sequence[Window], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Give inputs and labels `[B, T]` of windows; what is short is filled up behind.

    A causal model never sees what stands behind, so the fill changes nothing.
    """
    length = max(len(window.tokens) for window in windows) - 1
    inputs_BT = np.zeros((len(windows), length), dtype=np.int64)
    labels_BT = np.full((len(windows), length), IGNORED_LABEL, dtype=np.int64)
    for row, window in enumerate(windows):
        stop = len(window.tokens) - 1
        inputs_BT[row, :stop] = window.tokens[:-1]
        first = stop - window.num_scored
        labels_BT[row, first:stop] = window.tokens[1 + first :]
    return torch.from_numpy(inputs_BT).to(device), torch.from_numpy(labels_BT).to(device)
