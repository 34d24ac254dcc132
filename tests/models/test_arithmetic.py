"""Closed-form FLOPs against the products that a forward and a backward pass really run.

The counter sees matrix products only and counts all T^2 scores of math attention, also those that
the mask removes; the closed form counts the scores that are needed.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.gpt import GptConfig
from pipeline.config.model import ModelConfig
from pipeline.models import build_model

VOCAB = 40
SIZE = {"width": 16, "depth": 2, "heads": 2}
TOKENS = 7
SAMPLES = 3

GPTS = [
    GptConfig.model_validate({**SIZE, "positions": positions, "activation": activation, **width})
    for positions, activation, width in itertools.product(
        ("rope", "learned", "none"), ("gelu", "swiglu"), ({}, {"feed_forward_width": 20})
    )
]


def count_flops(model: nn.Module) -> int:
    tokens = torch.randint(VOCAB, (SAMPLES, TOKENS + 1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    return counter.get_total_flops()


def masked_flops(config: ModelConfig, num_attentions: int, attended_tokens: float) -> float:
    """FLOPs a token that math attention spends on scores which the mask removes.

    Scores and their use are 2 products of 2 FLOPs a multiply-add, run once forward, twice backward.
    """
    return 3 * 2 * 2 * config.width * num_attentions * (TOKENS - attended_tokens)


@pytest.mark.parametrize(
    "config", GPTS, ids=lambda config: f"{config.positions}-{config.activation}"
)
def test_gpt_flops_equal_the_counted_products(config: GptConfig) -> None:
    counted = count_flops(build_model(config, VOCAB, seed=0)) / (SAMPLES * TOKENS)
    masked = masked_flops(config, config.depth, (TOKENS + 1) / 2)
    assert config.flops_per_token(VOCAB, TOKENS) + masked == pytest.approx(counted, rel=1e-12)


def test_published_gpt2_small_has_its_published_size() -> None:
    # The released weights hold 124,439,808 numbers, 9 d of them a block in biases of matrices,
    # which this model does without.
    config = GptConfig(
        width=768, depth=12, heads=12, max_positions=1024, positions="learned",
        norm="layernorm", activation="gelu",
    )  # fmt: skip
    biases = 12 * 9 * 768
    assert config.num_parameters(50257).total + biases == 124_439_808
