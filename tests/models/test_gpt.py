"""The Transformer against its equations, composed by hand from plain operations.

Shapes: `B` batch, `T` time, `D` model.
"""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.explain import validate
from pipeline.config.gpt import GptConfig
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.models import build_model
from pipeline.models.attention import build_sight
from pipeline.models.documents import Borders
from pipeline.models.gpt import GptLM
from pipeline.models.layers import FeedForward

WIDTH, HEADS, TOKENS = 12, 2, 9


def normalized(x_BTD: Tensor, kind: str) -> Tensor:
    """Give a fresh normalisation: gain 1, bias 0."""
    if kind == "layernorm":
        x_BTD = x_BTD - x_BTD.mean(dim=2, keepdim=True)
    return x_BTD / (x_BTD.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()


def feed_forward_by_hand(layer: FeedForward, x_BTD: Tensor, activation: str) -> Tensor:
    up = by_hand(layer.up, x_BTD)
    if activation == "gelu":
        hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    elif activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)
        hidden = up * 0.5 * (1 + torch.tanh(inner))
    else:
        gate, value = up.chunk(2, dim=2)
        hidden = gate / (1 + torch.exp(-gate)) * value
    return by_hand(layer.down, hidden)


def by_hand(linear: nn.Linear, x_BTD: Tensor) -> Tensor:
    y_BTD = x_BTD @ linear.weight.T
    return y_BTD if linear.bias is None else y_BTD + linear.bias


def attention_by_hand(attention: Any, x_BTD: Tensor, rotates: bool) -> Tensor:
    heads = []
    parts = by_hand(attention.qkv, x_BTD).chunk(3, dim=2)
    for query, key, value in zip(*(part.chunk(HEADS, dim=2) for part in parts), strict=True):
        if rotates:
            query, key = turned(query), turned(key)
        scores = query @ key.transpose(1, 2) / math.sqrt(WIDTH // HEADS)
        future = torch.ones(TOKENS, TOKENS).triu(1).bool()
        heads.append(scores.masked_fill(future, -math.inf).softmax(dim=2) @ value)
    return by_hand(attention.out, torch.cat(heads, dim=2))


def turned(x_BTK: Tensor) -> Tensor:
    half = x_BTK.shape[2] // 2
    speeds = 10_000.0 ** (-torch.arange(half) / half)
    phases = torch.outer(torch.arange(TOKENS), speeds)
    pairs = torch.complex(x_BTK[..., :half], x_BTK[..., half:]) * torch.exp(1j * phases)
    return torch.cat((pairs.real, pairs.imag), dim=2)


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
@pytest.mark.parametrize(
    ("norm", "activation", "biases", "tied_head"),
    [
        ("rmsnorm", "swiglu", False, True),
        ("layernorm", "gelu", False, True),
        ("layernorm", "gelu_tanh", True, True),
        ("rmsnorm", "swiglu", True, False),
    ],
)
def test_logits_equal_the_equations_composed_by_hand(
    positions: str, norm: str, activation: str, biases: bool, tied_head: bool
) -> None:
    config = GptConfig.model_validate(
        {
            "width": WIDTH, "depth": 2, "heads": HEADS, "max_positions": TOKENS + 4,
            "positions": positions, "norm": norm, "activation": activation,
            "biases": biases, "tied_head": tied_head,
        }
    )  # fmt: skip
    model = build_model(config, 30, seed=0)
    assert isinstance(model, GptLM)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(10.0)  # at 0.2 a wrong sub-layer moves the logits visibly
            elif "norm" not in name:
                parameter.normal_(std=0.2)
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
        head_VD = model.embedding_VD if tied_head else model.head_VD
        expected_BTV = gain * normalized(x_BTD, norm) @ head_VD.T
        torch.testing.assert_close(model.logits(inputs_BT), expected_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init_std", [0.02, 0.006])
def test_matrices_start_with_the_published_spread(init_std: float) -> None:
    depth = 8
    config = GptConfig(width=256, depth=depth, heads=4, init_std=init_std, biases=True)
    model = build_model(config, 512, seed=0)
    assert isinstance(model, GptLM)
    block = model.blocks[3]
    for matrix in (model.embedding_VD, block.attention.qkv.weight, block.feed_forward.up.weight):
        assert matrix.std().item() == pytest.approx(init_std, rel=0.02)
    for matrix in (block.attention.out.weight, block.feed_forward.down.weight):
        assert matrix.std().item() == pytest.approx(init_std / math.sqrt(2 * depth), rel=0.02)
    for name, parameter in model.named_parameters():
        assert not name.endswith("bias") or not parameter.any()


def test_a_causal_layer_without_positions_ends_the_same_for_every_order_of_its_prefix() -> None:
    model = wide_awake(GptConfig(width=16, depth=1, heads=2, positions="none"))
    tokens = torch.randperm(30, generator=torch.Generator().manual_seed(2))[None, :TOKENS]
    turned_round = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(tokens)[:, -1], model.logits(turned_round)[:, -1], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("positions", "is_blind"), [("none", True), ("rope", False)])
def test_only_positions_tell_a_model_that_sees_both_sides_about_order(
    positions: str, is_blind: bool
) -> None:
    fields = {"width": 16, "depth": 2, "heads": 2, "causal": False, "positions": positions}
    model = wide_awake(GptConfig.model_validate(fields))
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3))
    tokens = torch.arange(TOKENS)[None]
    with torch.no_grad():
        before, after = model.logits(tokens)[:, order], model.logits(tokens[:, order])
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-5) == is_blind


def test_two_causal_layers_without_positions_do_know_the_order() -> None:
    model = wide_awake(GptConfig(width=16, depth=2, heads=2, positions="none"))
    tokens = torch.arange(TOKENS)[None]
    other = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)
    with torch.no_grad():
        shift = (model.logits(tokens) - model.logits(other))[:, -1].abs().max()
    assert shift > 1e-3


def wide_awake(config: GptConfig) -> GptLM:
    """Build a model whose attention is far from even."""
    model = build_model(config, 30, seed=0)
    assert isinstance(model, GptLM)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if parameter.dim() == 2 else 1.0)
    return model


def test_dropout_falls_on_the_branches_and_scales_up_what_it_spares() -> None:
    model = wide_awake(GptConfig(width=16, depth=1, heads=2, dropout=0.5))
    block, x_BTD = model.blocks[0], torch.zeros(64, TOKENS, 16)
    added = []
    block.attention.out.register_forward_hook(lambda *_: torch.ones(64, TOKENS, 16))
    block.feed_forward.down.register_forward_hook(lambda *_: torch.full((64, TOKENS, 16), 10.0))
    sight = build_sight(model.config, x_BTD, 0, Borders())
    torch.manual_seed(0)
    added = block(x_BTD, sight)
    # Each branch is dropped or doubled, by itself.
    assert set(added.unique().tolist()) == {0.0, 2.0, 20.0, 22.0}
    assert added.mean().item() == pytest.approx(11.0, rel=0.05)
    assert set(model.eval().blocks[0](x_BTD, sight).unique().tolist()) == {11.0}


@pytest.mark.parametrize("extends", [False, True])
def test_dropout_falls_on_the_sum_of_tokens_and_learned_positions(extends: bool) -> None:
    config = GptConfig(width=16, depth=1, heads=2, dropout=0.5, positions="learned")
    model = wide_awake(config)
    torch.nn.init.constant_(model.embedding_VD, 1.0)
    torch.nn.init.constant_(model.positions_PD, 10.0)
    tokens, read = torch.zeros(64, TOKENS, dtype=torch.long), []
    model.blocks[0].attention_norm.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        _ = model.extend(tokens, model.start(64)) if extends else model.logits(tokens)
    # Dropped or doubled as a whole, as in GPT-2's released code.
    assert set(read[0].unique().tolist()) == {0.0, 22.0}


def test_dropout_draws_first_for_the_embedded_tokens() -> None:
    model = wide_awake(GptConfig(width=16, depth=1, heads=2, dropout=0.5))
    tokens, read = torch.arange(TOKENS)[None], []
    model.blocks[0].register_forward_pre_hook(lambda _, given: read.append(given[0]))
    torch.manual_seed(0)
    model(tokens)
    torch.manual_seed(0)
    assert torch.equal(read[0], nn.functional.dropout(model.embedding_VD[tokens], 0.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "width=128 is not a multiple of heads=3; nearest width: 126 or 129"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4; legal: 1, 2, 4, or null for 4"),
        ({"kv_heads": 8}, "kv_heads=8 does not divide heads=4; legal: 1, 2, 4"),
        ({"width": 12}, "width/heads=3 is odd"),
        (
            {"window_tokens": 2048},
            "window_tokens=2048 is longer than max_positions=1024; nearest: 1024, or null",
        ),
        ({"positions": "rotary"}, "'rope', 'learned', 'none' or 'alibi'"),
        ({"activation": "relu"}, "'gelu', 'gelu_tanh' or 'swiglu'"),
        ({"norm": "batchnorm"}, "'rmsnorm' or 'layernorm'"),
        ({"dropout": 1.0}, "less than 1"),
        ({"init_std": 0.0}, "greater than 0"),
        ({"preset": "gpt2_125m"}, "'gpt2_124m', 'gpt2_355m'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_a_shape_that_cannot_be_is_refused_with_the_legal_ones(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        validate(RunConfig, {"model": {"family": "gpt", **fields}}, "run.yaml")
    assert str(caught.value).startswith("run.yaml: model.")


def test_a_model_that_sees_later_tokens_does_not_generate() -> None:
    model = build_model(GptConfig(width=16, depth=1, heads=2, causal=False), 30, seed=0)
    with pytest.raises(ConfigError, match="model.causal=false sees later tokens"):
        model.extend(torch.zeros(1, 3, dtype=torch.long), model.start(1))
