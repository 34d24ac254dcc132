"""Combinations of fields that make no model are refused by name, with what would be legal."""

from typing import Any

import pytest

from pipeline.config.explain import validate
from pipeline.config.lstm import LstmConfig
from pipeline.errors import ConfigError

VANILLA = {"backbone": "vanilla", "feed_forward": False, "attention": "none"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 1, "attention_after": "second_last"}, "attention_after=second_last needs depth"),
        (
            {"attention": "none", "attention_after": "second_last"},
            "attention_after=second_last places .*; legal: last, or attention=scaled_dot, dot or",
        ),
        (
            {"attention": "none", "window_tokens": 4},
            "window_tokens=4 limits .*; legal: null, or attention=scaled_dot, dot or additive",
        ),
        (
            {"window_tokens": 65, "max_positions": 64},
            "window_tokens=65 is longer than max_positions=64; nearest: 64, or null",
        ),
        (
            {"backbone": "vanilla", "attention": "none"},
            "feed_forward=true adds to a residual stream, .*; legal: false, or backbone=residual",
        ),
        (
            {**VANILLA, "attention": "scaled_dot"},
            "attention=scaled_dot adds to a residual stream, .*; legal: none, dot, additive, or",
        ),
        (
            {"input_feeding": True, "attention": "none"},
            "input_feeding=true feeds .*; legal: false, or attention=scaled_dot, dot or additive",
        ),
        (
            {"input_feeding": True, "cell": "min_lstm"},
            "input_feeding=true runs token by token, .*; legal: false, or cell=lstm, gru or elman",
        ),
        (
            {"input_feeding": True, "weight_drop": 0.5},
            "weight_drop=0.5 cuts the same .*; legal: 0, or input_feeding=false",
        ),
        (
            {"weight_drop": 0.5, "cell": "min_lstm"},
            "weight_drop=0.5 cuts recurrent .*; legal: 0, or cell=lstm, gru or elman",
        ),
        ({"cell": "elman", "forget_bias": 0.0}, "forget_bias=0.0 needs a forget gate, .*; legal:"),
        ({"cell": "elman", "forget_bias": "chrono"}, "forget_bias=chrono needs a forget gate"),
        (
            {"forget_bias": "chrono", "max_positions": 2},
            "forget_bias=chrono .* max_positions=2; nearest: max_positions=3",
        ),
        ({"carry_state": True}, "carry_state=true .* because samples are shuffled; legal: false"),
        ({"cell": "lstmm"}, "cell: .*'gru'.*did you mean lstm"),
        ({"attention": "dots"}, "attention: .*'additive'.*did you mean dot"),
        ({"backbone": "plain"}, "backbone: .*'residual' or 'vanilla'"),
        ({"attention_after": "first"}, "attention_after: .*'last' or 'second_last'"),
        ({"forget_bias": "chron"}, "forget_bias.*'chrono'"),
        ({"input_dropout": 1.0}, "input_dropout: .*less than 1"),
        ({"weight_drop": -0.1}, "weight_drop: .*nearest: 0"),
        ({"heads": 3}, "width=128 is not a multiple of heads=3; nearest width: 126 or 129"),
        ({"window_tokens": 0}, "window_tokens: .*nearest: 1"),
    ],
)
def test_an_impossible_combination_names_the_field_and_what_is_legal(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(LstmConfig, fields, "model")


@pytest.mark.parametrize(
    "fields",
    [
        VANILLA,
        {**VANILLA, "attention": "dot", "attention_after": "second_last", "input_feeding": True},
        {"window_tokens": 64, "max_positions": 64},
        {"cell": "elman"},
        {"cell": "gru", "forget_bias": "chrono", "weight_drop": 0.5},
        {"cell": "min_lstm", "attention": "additive", "forget_bias": 0},
    ],
)
def test_a_possible_combination_survives_a_round_trip(fields: dict[str, Any]) -> None:
    config = LstmConfig.model_validate(fields)
    assert LstmConfig.model_validate(config.model_dump()) == config
