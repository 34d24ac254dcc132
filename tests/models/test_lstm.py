"""Backbones against their sub-layers composed by hand, dropout against its masks.

Shapes: `B` batch, `T` time, `D` model, `C` state.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.lstm import LstmConfig
from pipeline.models import build_model
from pipeline.models.documents import Borders
from pipeline.models.lstm import LstmAttentionLM

SIZE = {"width": 12, "depth": 3, "heads": 2, "norm": "layernorm", "activation": "gelu"}
VANILLA = {"backbone": "vanilla", "feed_forward": False}


def make(**fields: Any) -> LstmAttentionLM:
    model = build_model(LstmConfig.model_validate({**SIZE, **fields}), 50, seed=0)
    assert isinstance(model, LstmAttentionLM)
    return model


def embedded(num_samples: int = 2, num_tokens: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_samples, num_tokens, 12, generator=generator)


def gradients(model: nn.Module, output_BTD: Tensor) -> dict[str, Tensor]:
    """Give the gradients of a fixed random functional of the output."""
    model.zero_grad()
    factors_BTD = torch.randn(output_BTD.shape, generator=torch.Generator().manual_seed(2))
    (output_BTD * factors_BTD).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_runs(model: nn.Module, actual_BTD: Tensor, expected_BTD: Tensor) -> None:
    torch.testing.assert_close(actual_BTD, expected_BTD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradients(model, actual_BTD), gradients(model, expected_BTD), rtol=1e-3, atol=1e-4
    )


def normalized(x_BTD: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred_BTD = x_BTD - x_BTD.mean(dim=2, keepdim=True)
    centred_BTD = centred_BTD / (centred_BTD.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    return centred_BTD * norm.weight + norm.bias


def backbone_by_hand(
    model: LstmAttentionLM, x_BTD: Tensor, unrolled: type[nn.Module], attended_layer: int | None
) -> Tensor:
    """Compose the sub-layers as the design states them, recurrences as loops over time."""
    for index, layer in enumerate(model.layers):
        state_BTC = unrolled(layer.cell)(normalized(x_BTD, layer.cell_norm))[0]
        if layer.projection is not None:
            state_BTC = state_BTC @ layer.projection.weight.T
        x_BTD = x_BTD + state_BTC
        if layer.feed_forward is not None:
            normed_BTD = normalized(x_BTD, layer.feed_forward_norm)
            hidden = nn.functional.gelu(normed_BTD @ layer.feed_forward.up.weight.T)
            x_BTD = x_BTD + hidden @ layer.feed_forward.down.weight.T
        if index == attended_layer:
            x_BTD = x_BTD + model.attention(normalized(x_BTD, model.attention_norm))[0]
    return x_BTD


@pytest.mark.parametrize(
    ("fields", "attended_layer"),
    [
        ({}, 2),
        ({"attention_after": "second_last", "attention": "dot"}, 1),
        ({"attention": "none"}, None),
        ({"hidden_width": 20, "window_tokens": 3}, 2),
        ({"feed_forward": False, "forget_bias": 3.0, "attention": "additive"}, 2),
        ({"cell": "gru", "attention": "none", "forget_bias": "chrono"}, None),
        ({"cell": "elman", "hidden_width": 20}, 2),
        ({"cell": "min_lstm", "attention_after": "second_last"}, 1),
    ],
)
def test_residual_backbone_equals_the_equations_unrolled_by_hand(
    fields: dict[str, Any], attended_layer: int | None, unrolled_cell: type[nn.Module]
) -> None:
    model, x_BTD = make(**fields), embedded()
    expected_BTD = backbone_by_hand(model, x_BTD, unrolled_cell, attended_layer)
    assert_equal_runs(model, model.backbone(x_BTD, Borders()), expected_BTD)


@pytest.mark.parametrize(("cell", "stack"), [("lstm", nn.LSTM), ("gru", nn.GRU), ("elman", nn.RNN)])
def test_vanilla_backbone_equals_the_stacked_module_of_torch(
    cell: str, stack: type[nn.RNNBase]
) -> None:
    model, x_BTD = make(**VANILLA, cell=cell, attention="none"), embedded()
    assert isinstance(model.final_norm, nn.Identity)
    stacked = stack(12, 12, num_layers=3, batch_first=True)
    stacked.load_state_dict(
        {
            name.replace("_l0", f"_l{index}"): value
            for index, layer in enumerate(model.layers)
            for name, value in layer.cell.state_dict().items()
        }
    )
    actual_BTD = model.backbone(x_BTD, Borders())
    torch.testing.assert_close(actual_BTD, stacked(x_BTD)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["dot", "additive"])
def test_vanilla_attention_replaces_the_state(attention: str) -> None:
    model, x_BTD = make(**VANILLA, attention=attention, attention_after="second_last"), embedded()
    below_BTD = model.layers[1](model.layers[0](x_BTD)[0])[0]
    expected_BTD = model.layers[2](model.attention(below_BTD)[0])[0]
    assert_equal_runs(model, model.backbone(x_BTD, Borders()), expected_BTD)


def feed_by_hand(model: LstmAttentionLM, x_BTD: Tensor, window_tokens: int) -> Tensor:
    """Luong's loop with torch's own cells. Source: Luong et al. 2015, figure 4 and equation 5."""
    cells = []
    for layer in model.layers:
        cell = nn.LSTMCell(layer.cell.weight_ih_l0.shape[1], 12)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            delattr(cell, name)
            setattr(cell, name, layer.cell.get_parameter(f"{name}_l0"))
        cells.append(cell)
    is_residual = model.config.backbone == "residual"
    states = [(x_BTD.new_zeros(2, 12), x_BTD.new_zeros(2, 12)) for _ in cells]
    recalled_BD, past, found = x_BTD.new_zeros(2, 12), [], []
    for x_BD in x_BTD.unbind(1):
        for index, (layer, cell) in enumerate(zip(model.layers, cells, strict=True)):
            read_BD = normalized(x_BD[None], layer.cell_norm)[0] if is_residual else x_BD
            if index == 0:
                read_BD = torch.cat((read_BD, recalled_BD), dim=1)
            states[index] = cell(read_BD, states[index])
            x_BD = x_BD + states[index][0] if is_residual else states[index][0]
        query_BD = normalized(x_BD[None], model.attention_norm)[0] if is_residual else x_BD
        past = [*past, query_BD][-window_tokens:]
        past_BSD = torch.stack(past, dim=1)
        weights_BS = ((past_BSD @ query_BD.unsqueeze(2)).squeeze(2) / 12**0.5).softmax(dim=1)
        context_BD = (weights_BS.unsqueeze(1) @ past_BSD).squeeze(1)
        both_BE = torch.cat((context_BD, query_BD), dim=1)
        recalled_BD = (both_BE @ model.attention.combine.weight.T).tanh()
        found.append(x_BD + recalled_BD if is_residual else recalled_BD)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("window_tokens", [None, 3])
@pytest.mark.parametrize("backbone", ["residual", "vanilla"])
def test_input_feeding_equals_a_plain_loop_over_cells_of_torch(
    backbone: str, window_tokens: int | None
) -> None:
    model, x_BTD = make(
        backbone=backbone, feed_forward=False, attention="dot", input_feeding=True,
        window_tokens=window_tokens,
    ), embedded()  # fmt: skip
    # Large, so that what is fed back matters.
    nn.init.normal_(model.attention.combine.weight, generator=torch.Generator().manual_seed(3))
    expected_BTD = feed_by_hand(model, x_BTD, window_tokens or 10)
    assert_equal_runs(model, model.backbone(x_BTD, Borders()), expected_BTD)


ARMS = [
    {**shape, **attention, "cell": cell}
    for (shape, attention), cell in itertools.product(
        [
            *itertools.product(
                ({}, {"hidden_width": 20}),
                (
                    {"attention": "none"},
                    {"attention_after": "second_last"},
                    {"window_tokens": 4},
                    {"attention": "dot"},
                    {"attention": "additive", "window_tokens": 3},
                ),
            ),
            (VANILLA, {"attention": "dot"}),
        ],
        ("lstm", "gru", "elman", "min_lstm"),
    )
] + [
    {"input_feeding": True, "attention": attention, **fields}
    for attention, fields in itertools.product(
        ("dot", "additive", "scaled_dot"),
        ({}, {"window_tokens": 2}, {"attention_after": "second_last", "cell": "gru"}),
    )
]
every_arm = pytest.mark.parametrize(
    "arm", ARMS, ids=lambda arm: ",".join(str(value) for value in arm.values())
)


@every_arm
def test_generation_with_a_cache_equals_full_recomputation(arm: dict[str, Any]) -> None:
    model = make(**arm, max_positions=16)
    # Larger than at the start, so that what the cache holds matters.
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.detach().mul_(2.0)
    tokens_BT = torch.randint(50, (3, 13), generator=torch.Generator().manual_seed(4))
    config, cache = model.config, model.start(3)
    assert cache.num_bytes == 3 * config.generation_state_bytes(0, 4)
    with torch.no_grad():
        expected_BTV = model.logits(tokens_BT)
        for first, last in [(0, 5), *((t, t + 1) for t in range(5, 10)), (10, 13)]:
            actual_BTV = model.extend(tokens_BT[:, first:last], cache)
            torch.testing.assert_close(
                actual_BTV, expected_BTV[:, first:last], rtol=1e-5, atol=1e-5
            )
            assert cache.num_bytes == 3 * config.generation_state_bytes(last, 4)


def test_dropout_falls_on_every_sub_layer_in_training_only() -> None:
    fields = {"dropout": 0.5, "depth": 1, "attention": "dot"}
    model, x_BTD = make(**fields), embedded()
    torch.manual_seed(5)
    actual_BTD = model.backbone(x_BTD, Borders())
    torch.manual_seed(5)
    layer, drop = model.layers[0], nn.Dropout(0.5)
    y_BTD = x_BTD + drop(layer.cell(normalized(x_BTD, layer.cell_norm))[0])
    y_BTD = y_BTD + drop(layer.feed_forward(normalized(y_BTD, layer.feed_forward_norm)))
    y_BTD = y_BTD + drop(model.attention(normalized(y_BTD, model.attention_norm))[0])
    torch.testing.assert_close(actual_BTD, y_BTD)
    whole = make(**{**fields, "dropout": 0.0}).backbone(x_BTD, Borders())
    torch.testing.assert_close(model.eval().backbone(x_BTD, Borders()), whole)


def test_input_dropout_zeroes_the_same_features_at_every_token() -> None:
    model = make(input_dropout=0.4, attention="none", **VANILLA, depth=1)
    model.layers[0] = Through()
    torch.manual_seed(6)
    ones_BTD = torch.ones(200, 10, 12)
    kept_BTD = model.backbone(ones_BTD, Borders())
    assert torch.equal(kept_BTD, kept_BTD[:, :1].expand_as(kept_BTD))
    assert kept_BTD.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    # Of 2,400 features; the standard error is 0.01.
    assert (kept_BTD[:, 0] == 0.0).float().mean().item() == pytest.approx(0.4, abs=0.04)
    assert torch.equal(model.eval().backbone(ones_BTD, Borders()), ones_BTD)


class Through(nn.Module):
    """A layer that gives its input."""

    def forward(self, x_BTD: Tensor, *_: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x_BTD, ()
