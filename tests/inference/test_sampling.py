import pytest
import torch
from pydantic import ValidationError

from pipeline.inference.sampling import SamplingConfig, next_token, token_probabilities

LOGITS_V = torch.tensor([0.5, 0.1, 0.2, 0.15, 0.05]).log() + 3.0


def probabilities(**fields: float) -> list[float]:
    found: list[float] = token_probabilities(
        LOGITS_V, SamplingConfig.model_validate(fields)
    ).tolist()
    return found


def test_temperature_one_is_the_softmax() -> None:
    assert probabilities() == pytest.approx([0.5, 0.1, 0.2, 0.15, 0.05], rel=1e-5)


@pytest.mark.parametrize("temperature", [1e-4, 1e-39, 5e-324])
def test_the_smallest_temperatures_leave_the_likeliest(temperature: float) -> None:
    assert probabilities(temperature=temperature) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_temperature_is_a_power_of_the_probabilities() -> None:
    squares = [p**2 for p in (0.5, 0.1, 0.2, 0.15, 0.05)]
    expected = [p / sum(squares) for p in squares]
    assert probabilities(temperature=0.5) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 1}, [0.5, 0, 0, 0, 0]),
        ({"top_k": 3}, [0.5, 0, 0.2, 0.15, 0]),
        ({"top_k": 9}, [0.5, 0.1, 0.2, 0.15, 0.05]),
        ({"top_p": 0.4}, [0.5, 0, 0, 0, 0]),
        ({"top_p": 0.6}, [0.5, 0, 0.2, 0, 0]),
        ({"top_p": 0.86}, [0.5, 0.1, 0.2, 0.15, 0]),
        ({"top_p": 1.0}, [0.5, 0.1, 0.2, 0.15, 0.05]),
        # Of the three that top-k leaves, 0.5 / 0.85 is below 0.6 and with 0.2 / 0.85 beyond it.
        ({"top_k": 3, "top_p": 0.6}, [0.5, 0, 0.2, 0, 0]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(fields: dict[str, float], kept: list[float]) -> None:
    expected = [p / sum(kept) for p in kept]
    assert probabilities(**fields) == pytest.approx(expected, rel=1e-5)


def test_draws_follow_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = [next_token(LOGITS_V, SamplingConfig(top_k=3), generator) for _ in range(4000)]
    for token, expected in ((0, 0.5 / 0.85), (2, 0.2 / 0.85), (3, 0.15 / 0.85)):
        # Four standard deviations of a binomial share.
        tolerance = 4 * (expected * (1 - expected) / 4000) ** 0.5
        assert draws.count(token) / 4000 == pytest.approx(expected, abs=tolerance)
    assert {1, 4}.isdisjoint(draws)


def test_temperature_zero_takes_the_likeliest_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert next_token(LOGITS_V, SamplingConfig(temperature=0), generator) == 0
    assert torch.equal(generator.get_state(), before)
    assert next_token(torch.tensor([1.0, 2.0, 2.0]), SamplingConfig(temperature=0), generator) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature": 0, "top_k": 5},
        {"temperatur": 1},
    ],
)
def test_illegal_options_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig.model_validate(fields)
