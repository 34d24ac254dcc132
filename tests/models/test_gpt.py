"""The Transformer against its equations, composed by hand from plain operations.

Shapes: `B` batch, `T` time, `D` model.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.gpt import GptConfig
from pipeline.models import build_model
from pipeline.models.gpt import GptLM
from pipeline.models.layers import FeedForward

WIDTH, HEADS, TOKENS = 12, 2, 9


def normalized(x_BTD: Tensor, kind: str) -> Tensor:
    """Give a fresh normalisation: gain 1, bias 0."""
    if kind == "layernorm":
        x_BTD = x_BTD - x_BTD.mean(dim=2, keepdim=True)
    return x_BTD / (x_BTD.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()


def feed_forward_by_hand(layer: FeedForward, x_BTD: Tensor, activation: str) -> Tensor:
    up = x_BTD @ layer.up.weight.T
    if activation == "gelu":
        hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    else:
        gate, value = up.chunk(2, dim=2)
        hidden = gate / (1 + torch.exp(-gate)) * value
    return hidden @ layer.down.weight.T


def attention_by_hand(attention: Any, x_BTD: Tensor, rotates: bool) -> Tensor:
    heads = []
    for query, key, value in zip(
        *((x_BTD @ part.T).chunk(HEADS, dim=2) for part in attention.qkv.weight.chunk(3)),
        strict=True,
    ):
        if rotates:
            query, key = turned(query), turned(key)
        scores = query @ key.transpose(1, 2) / math.sqrt(WIDTH // HEADS)
        future = torch.ones(TOKENS, TOKENS).triu(1).bool()
        heads.append(scores.masked_fill(future, -math.inf).softmax(dim=2) @ value)
    return torch.cat(heads, dim=2) @ attention.out.weight.T


def turned(x_BTK: Tensor) -> Tensor:
    half = x_BTK.shape[2] // 2
    speeds = 10_000.0 ** (-torch.arange(half) / half)
    phases = torch.outer(torch.arange(TOKENS), speeds)
    pairs = torch.complex(x_BTK[..., :half], x_BTK[..., half:]) * torch.exp(1j * phases)
    return torch.cat((pairs.real, pairs.imag), dim=2)


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
@pytest.mark.parametrize(("norm", "activation"), [("rmsnorm", "swiglu"), ("layernorm", "gelu")])
def test_logits_equal_the_equations_composed_by_hand(
    positions: str, norm: str, activation: str
) -> None:
    config = GptConfig.model_validate(
        {
            "width": WIDTH, "depth": 2, "heads": HEADS, "max_positions": TOKENS + 4,
            "positions": positions, "norm": norm, "activation": activation,
        }
    )  # fmt: skip
    model = build_model(config, 30, seed=0)
    assert isinstance(model, GptLM)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10.0)  # at 0.2 a wrong sub-layer moves the logits visibly
    inputs_BT = torch.randint(30, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x_BTD = model.embedding_VD[inputs_BT]
        if positions == "learned":
            x_BTD = x_BTD + torch.stack([model.positions_PD[time] for time in range(TOKENS)])
        for block in model.blocks:
            attended = normalized(x_BTD, norm)
            x_BTD = x_BTD + attention_by_hand(block.attention, attended, positions == "rope")
            x_BTD = x_BTD + feed_forward_by_hand(
                block.feed_forward, normalized(x_BTD, norm), activation
            )
        gain = min(1.0, 0.2 / (0.02 * math.sqrt(WIDTH)))
        expected_BTV = gain * normalized(x_BTD, norm) @ model.embedding_VD.T
        torch.testing.assert_close(model.logits(inputs_BT), expected_BTV, rtol=1e-5, atol=1e-5)


def test_matrices_start_with_the_published_spread() -> None:
    depth = 8
    model = build_model(GptConfig(width=256, depth=depth, heads=4), 512, seed=0)
    assert isinstance(model, GptLM)
    block = model.blocks[3]
    for matrix in (model.embedding_VD, block.attention.qkv.weight, block.feed_forward.up.weight):
        assert matrix.std().item() == pytest.approx(0.02, rel=0.02)
    for matrix in (block.attention.out.weight, block.feed_forward.down.weight):
        assert matrix.std().item() == pytest.approx(0.02 / math.sqrt(2 * depth), rel=0.02)
