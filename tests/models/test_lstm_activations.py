"""Closed form of the activations against what autograd really holds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.lstm import LstmConfig
from pipeline.config.schema import TrainConfig
from pipeline.models import build_model
from pipeline.models.execution import set_execution
from tests.models.counting import saved_bytes

SIZE = {"width": 128, "depth": 2, "heads": 2}
SAMPLES, TOKENS, VOCAB = 2, 32, 50
BARE = {"feed_forward": False, "attention": "none"}
VANILLA = {"feed_forward": False, "backbone": "vanilla"}

EXACT: list[dict[str, Any]] = [
    {"cell": "gru", **BARE},
    {"cell": "min_lstm", "hidden_width": 192, "norm": "layernorm"},
    {"cell": "min_lstm", "attention": "dot", "activation": "gelu", "window_tokens": 5},
    {"cell": "min_lstm", "attention": "additive", "dropout": 0.1, "input_dropout": 0.1},
    {"cell": "min_lstm", "window_tokens": 5, "depth": 3},
    {"cell": "min_lstm", **VANILLA, "attention": "dot"},
    {"cell": "min_lstm", **VANILLA, "attention": "none"},
    {"cell": "min_lstm", **VANILLA, "attention": "additive", "attention_after": "second_last"},
    {"cell": "gru", **VANILLA, "attention": "dot", "tied_head": False},
    {"cell": "gru", **VANILLA, "attention": "additive", "hidden_width": 192},
    {"cell": "gru", **VANILLA, "attention": "none"},
    {"cell": "gru", "attention": "dot", "weight_drop": 0.1},
    {"cell": "gru", "attention": "additive", "input_feeding": True},
    {"cell": "gru", "attention": "dot", "input_feeding": True, "window_tokens": 3},
]
KERNELS: list[dict[str, Any]] = [
    {},
    {"hidden_width": 192, "feed_forward": False},
    {**VANILLA, "attention": "none"},
    {**VANILLA, "attention": "dot"},
    {**VANILLA, "attention": "additive", "attention_after": "second_last"},
    {"cell": "elman", "hidden_width": 192},
    {"input_feeding": True},
    {"cell": "gru", "attention": "dot", "input_feeding": True, "window_tokens": 3, **VANILLA},
]
"""What oneDNN's own workspace or a first step without a past makes a few percent of."""


def draw_batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB, (SAMPLES, TOKENS + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@pytest.mark.parametrize(
    ("fields", "tolerance"), [*((a, 0.005) for a in EXACT), *((a, 0.03) for a in KERNELS)]
)
def test_activations_are_those_that_autograd_holds(
    fields: dict[str, Any], tolerance: float
) -> None:
    config = LstmConfig.model_validate({**SIZE, **fields})
    model = build_model(config, VOCAB, seed=0)
    expected = config.activation_bytes(SAMPLES, TOKENS, VOCAB, bytes_per_value=4)
    assert expected == pytest.approx(saved_bytes(model, *draw_batch()), rel=tolerance)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cell": "min_lstm", "dropout": 0.1, "attention": "additive"},
        {**VANILLA, "attention": "none", "weight_drop": 0.5},
    ],
)
def test_layers_that_run_again_keep_their_inputs_only(fields: dict[str, Any]) -> None:
    config = LstmConfig.model_validate({**SIZE, **fields})
    model = build_model(config, VOCAB, seed=0)
    set_execution(model, TrainConfig(activation_checkpointing=True))
    expected = config.activation_bytes(SAMPLES, TOKENS, VOCAB, 4, activation_checkpointing=True)
    assert expected == pytest.approx(saved_bytes(model, *draw_batch()), rel=0.005)
