"""The chain of both passes against a trace of a forward and a backward pass."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.estimate.chain import dependent_operations
from pipeline.models import build_model
from tests.estimate.test_products import GPT, LSTM, TOKENS, VOCAB, run_of
from tests.models.counting import ProductChain

MODELS: list[dict[str, Any]] = [
    GPT,
    {**GPT, "kv_heads": 1, "activation": "gelu", "window_tokens": 3},
    {**LSTM, "cell": "min_lstm"},
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: ",".join(map(str, model.values())))
def test_the_chain_of_both_passes_equals_the_traced_one(model: dict[str, Any]) -> None:
    run = run_of(model)
    built = build_model(run.model, VOCAB, seed=0)
    tokens = torch.randint(VOCAB, (1, TOKENS))
    with sdpa_kernel(SDPBackend.MATH), ProductChain() as chain:
        built.logits(tokens).sum().backward()
    assert dependent_operations(run) == max(chain.lengths.values())


def test_the_chain_grows_with_the_sequence_where_there_is_a_recurrence() -> None:
    assert dependent_operations(run_of(GPT)) == 2 * (6 * 2 + 1)
    # T - 1 steps, then through two layers of three products, four of attention, and the head.
    assert dependent_operations(run_of(LSTM)) == 2 * (TOKENS - 1 + 2 * 3 + 4 + 1)
