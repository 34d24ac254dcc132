"""The recurrent backbone against its equations, and the state in which an LSTM starts."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.lstm import LstmConfig
from pipeline.models import build_model
from pipeline.models.documents import Borders
from pipeline.models.lstm import LstmAttentionLM, initialize_lstm

SIZE = {"width": 12, "depth": 3, "heads": 2, "norm": "layernorm", "activation": "gelu"}


def normalized(x_BTD: Tensor) -> Tensor:
    """Give a fresh LayerNorm: gain 1, bias 0."""
    centred_BTD = x_BTD - x_BTD.mean(dim=2, keepdim=True)
    return centred_BTD / (centred_BTD.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()


def backbone_by_hand(
    model: LstmAttentionLM, x_BTD: Tensor, unrolled: type[nn.Module], attended_layer: int | None
) -> Tensor:
    """Compose the sub-layers as the design states them, LSTMs as loops over time."""
    for index, layer in enumerate(model.layers):
        state_BTC = unrolled(layer.lstm)(normalized(x_BTD))
        if layer.projection is not None:
            state_BTC = state_BTC @ layer.projection.weight.T
        x_BTD = x_BTD + state_BTC
        if layer.feed_forward is not None:
            hidden = nn.functional.gelu(normalized(x_BTD) @ layer.feed_forward.up.weight.T)
            x_BTD = x_BTD + hidden @ layer.feed_forward.down.weight.T
        if index == attended_layer:
            x_BTD = x_BTD + model.attention(normalized(x_BTD))
    return x_BTD


@pytest.mark.parametrize(
    ("fields", "attended_layer"),
    [
        ({}, 2),
        ({"attention_after": "second_last"}, 1),
        ({"attention": "none"}, None),
        ({"hidden_width": 20, "window_tokens": 3}, 2),
        ({"feed_forward": False, "forget_bias": 3.0}, 2),
    ],
)
def test_backbone_equals_the_equations_unrolled_by_hand(
    fields: dict[str, object], attended_layer: int | None, unrolled_lstm: type[nn.Module]
) -> None:
    config = LstmConfig.model_validate({**SIZE, **fields})
    model = build_model(config, 50, seed=0)
    assert isinstance(model, LstmAttentionLM)
    x_BTD = torch.randn(2, 10, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BTD = backbone_by_hand(model, x_BTD, unrolled_lstm, attended_layer)
        torch.testing.assert_close(
            model.backbone(x_BTD, Borders()), expected_BTD, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("forget_bias", [0.0, 1.0, 2.5])
def test_lstm_starts_with_the_stated_forget_bias_and_orthogonal_recurrence(
    forget_bias: float,
) -> None:
    lstm = nn.LSTM(10, 6, batch_first=True)
    initialize_lstm(lstm, forget_bias, torch.Generator().manual_seed(0))
    bias = (lstm.bias_ih_l0 + lstm.bias_hh_l0).chunk(4)
    for gate in range(4):
        assert torch.equal(bias[gate], torch.full((6,), forget_bias if gate == 1 else 0.0))
        recurrent_CC = lstm.weight_hh_l0.chunk(4)[gate]
        torch.testing.assert_close(recurrent_CC @ recurrent_CC.T, torch.eye(6), rtol=0, atol=1e-5)
        limit = (6 / (10 + 6)) ** 0.5
        assert 0.8 * limit < lstm.weight_ih_l0.chunk(4)[gate].abs().max() <= limit


def test_the_drawn_weights_are_those_that_the_lstm_computes_with() -> None:
    model = build_model(LstmConfig.model_validate(SIZE), 50, seed=0)
    assert isinstance(model, LstmAttentionLM)
    layer = model.layers[0]
    x_BTD = torch.ones(1, 4, 12)
    before_BTC = layer.lstm(x_BTD)
    with torch.no_grad():
        layer.lstm.bias_ih_l0.add_(1.0)
    after_BTC = layer.lstm(x_BTD)
    assert (before_BTC - after_BTC).abs().min() > 0.01
