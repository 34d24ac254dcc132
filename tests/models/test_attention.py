"""Attention against a plain loop, rotation against complex numbers.

Shapes: `B` batch, `T` time, `D` model, `H` heads, `K` head size, `R` half a head.
"""

import math

import pytest
import torch
from torch import Tensor

from pipeline.config.model_base import mean_attended_tokens
from pipeline.models.attention import CausalAttention, rotary_table, rotate, window_mask

CPU = torch.device("cpu")
TOKENS = 9


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def attend_by_loops(attention: CausalAttention, x_BTD: Tensor, window_tokens: int) -> Tensor:
    """Average past values with softmax weights, one sample, head and position at a time."""
    query_BTD, key_BTD, value_BTD = (x_BTD @ attention.qkv.weight.T).chunk(3, dim=2)
    result_BTD = torch.zeros_like(x_BTD)
    head_width = x_BTD.shape[2] // attention.heads
    for sample in range(x_BTD.shape[0]):
        for head in range(attention.heads):
            columns = slice(head * head_width, (head + 1) * head_width)
            for time in range(x_BTD.shape[1]):
                past = slice(max(0, time - window_tokens + 1), time + 1)
                scores = key_BTD[sample, past, columns] @ query_BTD[sample, time, columns]
                weights = (scores / math.sqrt(head_width)).softmax(dim=0)
                result_BTD[sample, time, columns] = weights @ value_BTD[sample, past, columns]
    return result_BTD @ attention.out.weight.T


@pytest.mark.parametrize("window_tokens", [None, 1, 4, TOKENS, TOKENS + 3])
def test_attention_equals_a_loop_over_past_states(
    window_tokens: int | None, generator: torch.Generator
) -> None:
    attention = CausalAttention(12, heads=3, window_tokens=window_tokens)
    attention.initialize(generator, residual_scale=1.0)
    # Weights of 0.02 would leave the softmax flat, and a wrong mask within the tolerance.
    torch.nn.init.normal_(attention.qkv.weight, generator=generator)
    x_BTD = torch.randn(2, TOKENS, 12, generator=generator)
    with torch.no_grad():
        expected_BTD = attend_by_loops(attention, x_BTD, window_tokens or TOKENS)
        torch.testing.assert_close(attention(x_BTD), expected_BTD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window_tokens", [1, 2, TOKENS, TOKENS + 5])
def test_mean_attended_tokens_counts_the_mask(window_tokens: int) -> None:
    seen = window_mask(TOKENS, window_tokens, CPU).sum().item()
    assert mean_attended_tokens(TOKENS, window_tokens) == pytest.approx(seen / TOKENS)
    assert mean_attended_tokens(TOKENS, None) == (TOKENS + 1) / 2


def test_rotation_multiplies_pairs_by_complex_phases(generator: torch.Generator) -> None:
    x_BHTK = torch.randn(2, 3, TOKENS, 8, generator=generator)
    pairs_BHTR = torch.complex(x_BHTK[..., :4].double(), x_BHTK[..., 4:].double())
    speeds_R = torch.tensor([10_000.0 ** (-2 * pair / 8) for pair in range(4)], dtype=torch.float64)
    phases_TR = torch.outer(torch.arange(TOKENS, dtype=torch.float64), speeds_R)
    turned_BHTR = pairs_BHTR * torch.polar(torch.ones_like(phases_TR), phases_TR)
    expected_BHTK = torch.cat((turned_BHTR.real, turned_BHTR.imag), dim=3).float()
    actual_BHTK = rotate(x_BHTK, *rotary_table(TOKENS, 8, CPU))
    torch.testing.assert_close(actual_BHTK, expected_BHTK, rtol=1e-5, atol=1e-6)


def test_rotated_scores_depend_on_the_distance_alone(generator: torch.Generator) -> None:
    query_K, key_K = torch.randn(2, 8, generator=generator)
    table = rotary_table(64, 8, CPU)
    queries_TK = rotate(query_K.expand(1, 1, 64, 8), *table)[0, 0]
    keys_TK = rotate(key_K.expand(1, 1, 64, 8), *table)[0, 0]
    scores_TT = queries_TK @ keys_TK.T
    for distance in (0, 1, 17):
        diagonal = scores_TT.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert not torch.allclose(scores_TT[0, 0], scores_TT[17, 0], atol=1e-2)


def test_rotation_in_bf16_is_exact_but_for_the_last_rounding(generator: torch.Generator) -> None:
    x_BHTK = torch.randn(1, 1, 2048, 8, generator=generator).bfloat16()
    table = rotary_table(2048, 8, CPU)
    rounded_BHTK = rotate(x_BHTK, *table)
    assert rounded_BHTK.dtype == torch.bfloat16
    assert torch.equal(rounded_BHTK, rotate(x_BHTK.float(), *table).bfloat16())
