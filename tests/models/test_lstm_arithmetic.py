"""Closed forms of the LSTM family against counting on the built model.

FLOPs are those of the products that a forward and a backward pass run. The counter sees nothing
inside a recurrent kernel, so the cells are unrolled first, and it counts all T^2 scores of math
attention, also those that the mask removes, where the closed form counts those that are needed.
The chain of dependent products is traced through a pass that takes one token after the other.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.lstm import LstmConfig
from pipeline.config.model_base import mean_attended_tokens
from pipeline.models import build_model
from pipeline.models.lstm import LstmAttentionLM
from tests.models.counting import ProductChain

VOCAB = 40
SIZE = {"width": 16, "depth": 2, "heads": 2}
TOKENS = 7
SAMPLES = 3
VANILLA = {"backbone": "vanilla", "feed_forward": False}

SHAPES: list[dict[str, Any]] = [
    {},
    {"hidden_width": 24, "activation": "gelu"},
    {"feed_forward": False, "hidden_width": 24, "depth": 3, "tied_head": False},
    {"cell": "gru"},
    {"cell": "elman", "feed_forward_width": 20},
    {"cell": "min_lstm"},
    {**VANILLA, "cell": "lstm"},
]
RECALLS: list[dict[str, Any]] = [
    {"attention": "none"},
    {"attention_after": "second_last"},
    {"window_tokens": 3},
    {"attention": "dot"},
    {"attention": "additive"},
    {"attention": "additive", "window_tokens": 3},
    {"attention": "dot", "input_feeding": True, "attention_after": "second_last"},
    {"attention": "additive", "input_feeding": True},
    {"input_feeding": True, "window_tokens": 2},
]


def is_possible(fields: dict[str, Any]) -> bool:
    is_scaled = fields.get("attention", "scaled_dot") == "scaled_dot"
    if fields.get("backbone") == "vanilla" and is_scaled:
        return False
    return not (fields.get("input_feeding") and fields.get("cell") == "min_lstm")


ARMS = [
    LstmConfig.model_validate({**SIZE, **shape, **recall})
    for shape, recall in itertools.product(SHAPES, RECALLS)
    if is_possible({**shape, **recall})
]
every_arm = pytest.mark.parametrize(
    "config",
    ARMS,
    ids=lambda config: ",".join(map(str, config.model_dump(exclude_defaults=True).values())),
)


def build(config: LstmConfig) -> LstmAttentionLM:
    model = build_model(config, VOCAB, seed=0)
    assert isinstance(model, LstmAttentionLM)
    return model


def surplus_flops(config: LstmConfig) -> float:
    """FLOPs a token that the arithmetic rightly leaves out: masked scores and recomputation."""
    if config.attention == "none":
        return 0.0
    # Scores and their use, 2 FLOPs a multiply-add.
    one_pass = 2 * 2 * config.width
    attended = mean_attended_tokens(TOKENS, config.window_tokens)
    computed = attended if config.input_feeding else TOKENS
    # Recomputation stops before the use of the scores, which needs only what is there by then.
    recomputed = one_pass / 2 * computed if config.attention == "additive" else 0.0
    return 3 * one_pass * (computed - attended) + recomputed


@every_arm
def test_flops_equal_the_counted_products_of_the_unrolled_model(
    config: LstmConfig, unrolled_cell: type[nn.Module]
) -> None:
    model = build(config)
    for layer in model.layers:
        layer.cell = unrolled_cell(layer.cell)
    tokens = torch.randint(VOCAB, (SAMPLES, TOKENS + 1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(tokens[:, :-1]).sum().backward()
    counted = counter.get_total_flops() / (SAMPLES * TOKENS)
    closed = config.flops_per_token(VOCAB, TOKENS) + surplus_flops(config)
    assert closed == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize(("window_tokens", "seen"), [(None, TOKENS), (3, 3), (TOKENS + 9, TOKENS)])
@pytest.mark.parametrize("attention", ["dot", "additive", "scaled_dot"])
def test_the_palm_convention_counts_every_score(
    attention: str, window_tokens: int | None, seen: int
) -> None:
    config = LstmConfig.model_validate({"attention": attention, "window_tokens": window_tokens})
    without = config.flops_per_token(VOCAB, TOKENS) - 12 * config.width * mean_attended_tokens(
        TOKENS, window_tokens
    )
    palm = config.flops_per_token(VOCAB, TOKENS, convention="palm")
    assert palm == pytest.approx(without + 12 * config.width * seen)


@every_arm
@pytest.mark.parametrize("num_tokens", [1, TOKENS])
def test_dependent_products_equal_the_traced_chain(config: LstmConfig, num_tokens: int) -> None:
    model, tokens = build(config), torch.randint(VOCAB, (1, TOKENS))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), ProductChain() as chain:
        cache = model.start(1)
        lengths = [
            chain.of(model.extend(tokens[:, time : time + 1], cache)) for time in range(num_tokens)
        ]
    assert config.dependent_products(num_tokens) == max(lengths) == lengths[-1]


def test_the_chain_is_that_of_the_study() -> None:
    # L + T with a wavefront, and about 3 L T with input feeding, beside constants of a layer.
    plain = {"depth": 4, "feed_forward": False, "attention": "none"}
    assert LstmConfig.model_validate(plain).dependent_products(512) == 4 + 511 + 1
    fed = LstmConfig(depth=1, feed_forward=False, attention="dot", input_feeding=True)
    assert fed.dependent_products(512) == 4 * 512 + 1
    scan = LstmConfig.model_validate({**plain, "cell": "min_lstm"})
    assert scan.dependent_products(512) == scan.dependent_products(1) == 4 + 1
