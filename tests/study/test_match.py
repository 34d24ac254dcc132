"""Sizes are matched by the closed forms, or the study is refused."""

from typing import Any

import pytest

from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig
from pipeline.config.study import MatchConfig
from pipeline.errors import ConfigError
from pipeline.models import build_model
from pipeline.study.match import match_model


def match(tolerance: float = 0.02, quantity: str = "non_embedding_parameters") -> MatchConfig:
    return MatchConfig.model_validate(
        {"reference": "gpt", "quantity": quantity, "tolerance_fraction": tolerance}
    )


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_a_match_is_within_the_tolerance_and_counts_what_the_model_has(depth: int) -> None:
    target = GptConfig(width=128, depth=4).num_parameters(0).non_embedding
    fields = {"family": "lstm_attention", "depth": depth}
    size = match_model("lstm", fields, target, match(), 0)
    assert abs(size.error_fraction) <= 0.02
    assert size.target == target
    model = build_model(size.model, 300, 0)
    counted = sum(p.numel() for p in model.parameters()) - 300 * size.model.width
    assert counted == size.num_parameters


def test_the_same_family_is_matched_to_itself_exactly() -> None:
    reference = GptConfig(width=96, depth=3)
    target = reference.num_parameters(0).non_embedding
    size = match_model("gpt", {"family": "gpt", "depth": 3}, target, match(), 0)
    assert size.model == reference
    assert size.error_fraction == 0.0


def test_no_other_width_is_closer() -> None:
    target = GptConfig(width=128, depth=4).num_parameters(0).non_embedding
    fields: dict[str, Any] = {"family": "lstm_attention", "depth": 3}
    size = match_model("lstm", fields, target, match(), 0)
    errors = {
        width: abs(LstmConfig(width=width, depth=3).num_parameters(0).non_embedding - target)
        for width in range(4, 400, 4)
    }
    assert size.model.width == min(errors, key=lambda width: errors[width])


def test_the_feed_forward_width_moves_where_no_width_is_close_enough() -> None:
    target = GptConfig(width=128, depth=4).num_parameters(0).non_embedding
    fields = {"family": "lstm_attention", "depth": 2, "heads": 16}
    by_width = match_model("lstm", fields, target, match(0.5), 0)
    close = match_model("lstm", fields, target, match(0.002), 0)
    assert abs(by_width.error_fraction) > 0.002
    assert abs(close.error_fraction) <= 0.002
    assert close.model.feed_forward_width is not None


def test_total_parameters_count_the_embedding() -> None:
    target = GptConfig(width=64, depth=2).num_parameters(1000).total
    fields = {"family": "lstm_attention", "depth": 2}
    size = match_model("lstm", fields, target, match(quantity="total_parameters"), 1000)
    assert size.num_parameters == size.model.num_parameters(1000).total
    assert abs(size.error_fraction) <= 0.02


def test_a_size_out_of_reach_is_refused_with_the_nearest() -> None:
    fields = {"family": "lstm_attention", "depth": 1, "heads": 64, "feed_forward": False}
    with pytest.raises(ConfigError, match=r"families.lstm: no width .* nearest: width=64"):
        match_model("lstm", fields, 20_000, match(0.001), 0)
