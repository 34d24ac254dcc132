"""Attention in all its options against a plain loop, rotations against complex numbers.

Shapes: `B` batch, `T` time, `D` model, `H` heads, `K` head size, `R` half a head.
"""

import cmath
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.gpt import GptConfig
from pipeline.config.model_base import mean_attended_tokens
from pipeline.config.schema import DocumentsConfig
from pipeline.models.attention import (
    SelfAttention,
    Sight,
    attend,
    attend_plainly,
    build_sight,
    seen_mask,
)
from pipeline.models.documents import Borders
from pipeline.models.positions import alibi_slopes, rotary_table, rotate

TOKENS, HEADS = 9, 4
DOCUMENTS_BT = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0] * 8 + [1]])
APART = Borders(
    documents_BT=DOCUMENTS_BT, switches=DocumentsConfig(mask_attention=True, reset_positions=True)
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"kv_heads": 2},
    {"kv_heads": 1, "biases": True},
    {"qk_norm": True, "biases": True},
    {"window_tokens": 1},
    {"window_tokens": 4, "kv_heads": 2, "qk_norm": True},
    {"causal": False},
    {"causal": False, "window_tokens": 3},
]
every_option = pytest.mark.parametrize(
    ("positions", "options"),
    [*itertools.product(("rope", "alibi", "none"), OPTIONS), ("rope", {"rope_base": 100.0})],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "plain",
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def config_of(**fields: Any) -> GptConfig:
    return GptConfig.model_validate({"width": 32, "heads": HEADS, "max_positions": 16, **fields})


def build_attention(config: GptConfig, generator: torch.Generator) -> SelfAttention:
    """Build one whose softmax is far from flat, so that a wrong mask is no rounding error."""
    attention = SelfAttention(config)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return attention


def turned(vector: Tensor, position: int, base: float) -> Tensor:
    """Rotate the pairs (x[r], x[r + R]) as complex numbers."""
    half = len(vector) // 2
    pairs = [
        complex(vector[r], vector[r + half]) * cmath.exp(1j * position * base ** (-r / half))
        for r in range(half)
    ]
    return torch.tensor([p.real for p in pairs] + [p.imag for p in pairs], dtype=vector.dtype)


def prepared(vector: Tensor, position: int, gain: Tensor | None, config: GptConfig) -> Tensor:
    """Give a query or key as it is scored: normalised, then rotated, where the config says so."""
    if gain is not None:
        vector = vector / (vector.square().mean() + config.norm_epsilon).sqrt() * gain
    return turned(vector, position, config.rope_base) if config.positions == "rope" else vector


def attend_by_loops(
    attention: SelfAttention, config: GptConfig, x_BTD: Tensor, documents: list[list[int]]
) -> Tensor:
    """Average values with softmax weights, one sample, head and position at a time, in float64."""
    weights = {name: p.detach().double() for name, p in attention.named_parameters()}
    gains = [weights.get(f"{name}_norm.weight") for name in ("query", "key")]
    head_width, groups = config.head_width, config.resolved_kv_heads
    window, slopes = config.window_tokens or TOKENS, alibi_slopes(HEADS)
    result_BTD = torch.zeros_like(x_BTD, dtype=torch.float64)
    for sample, (x_TD, rows) in enumerate(zip(x_BTD.double(), documents, strict=True)):
        read_TD = x_TD @ weights["qkv.weight"].T + weights.get("qkv.bias", 0.0)
        vectors = read_TD.view(TOKENS, -1, head_width)
        places = [time - rows.index(rows[time]) for time in range(TOKENS)]
        for head, time in itertools.product(range(HEADS), range(TOKENS)):
            group = head * groups // HEADS
            query = prepared(vectors[time, head], places[time], gains[0], config)
            scores, values = [], []
            for other in range(TOKENS):
                distance = time - other
                is_near = -window < distance < window and not (config.causal and distance < 0)
                if is_near and rows[other] == rows[time]:
                    key = vectors[other, HEADS + group]
                    score = query @ prepared(key, places[other], gains[1], config)
                    penalty = slopes[head] * abs(distance) if config.positions == "alibi" else 0.0
                    scores.append(score / math.sqrt(head_width) - penalty)
                    values.append(vectors[other, HEADS + groups + group])
            columns = slice(head * head_width, (head + 1) * head_width)
            result_BTD[sample, time, columns] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return (result_BTD @ weights["out.weight"].T + weights.get("out.bias", 0.0)).float()


@every_option
@pytest.mark.parametrize("borders", [Borders(), APART], ids=["one-document", "documents"])
def test_attention_equals_a_loop_over_what_it_sees(
    positions: str, options: dict[str, Any], borders: Borders, generator: torch.Generator
) -> None:
    config = config_of(positions=positions, **options)
    attention = build_attention(config, generator)
    x_BTD = torch.randn(2, TOKENS, 32, generator=generator)
    documents = [[0] * TOKENS] * 2 if borders.documents_BT is None else DOCUMENTS_BT.tolist()
    with torch.no_grad():
        actual_BTD = attention(x_BTD, build_sight(config, x_BTD, 0, borders))
    expected_BTD = attend_by_loops(attention, config, x_BTD, documents)
    torch.testing.assert_close(actual_BTD, expected_BTD, rtol=1e-4, atol=1e-4)


@every_option
def test_plain_products_equal_the_fused_kernel_in_values_and_gradients(
    positions: str, options: dict[str, Any], generator: torch.Generator
) -> None:
    config = config_of(positions=positions, **options)
    for borders in (APART, Borders()):
        sight = build_sight(config, torch.zeros(2, TOKENS, 32), 0, borders)
        found = []
        for compute in (attend, attend_plainly):
            generator.manual_seed(1)
            leaves = [
                torch.randn(2, heads, TOKENS, 8, generator=generator, requires_grad=True)
                for heads in (HEADS, config.resolved_kv_heads, config.resolved_kv_heads)
            ]
            y_BHTK = compute(*leaves, sight)
            y_BHTK.backward(torch.randn(y_BHTK.shape, generator=generator))
            found.append([y_BHTK, *(leaf.grad for leaf in leaves)])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_bf16_on_the_cpu_rounds_weights_and_sums_only(generator: torch.Generator) -> None:
    exact = [torch.randn(1, 2, 64, 16, generator=generator) for _ in range(3)]
    rounded = [part.bfloat16() for part in exact]
    sight = Sight(mask=None, is_causal=True, rotation=None)
    expected = attend(*(part.float() for part in rounded), sight)
    actual = attend(*rounded, sight)
    assert actual.dtype == torch.bfloat16
    # 8 bits in scores up to 4, in weights and in sums.
    torch.testing.assert_close(actual.float(), expected, rtol=0.0, atol=0.03)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window_tokens", [1, 2, TOKENS, TOKENS + 5])
def test_mean_attended_tokens_counts_the_mask(window_tokens: int, is_causal: bool) -> None:
    times_T = torch.arange(TOKENS)
    seen = seen_mask(times_T, times_T, window_tokens, is_causal=is_causal).sum().item() / TOKENS
    one_sided = mean_attended_tokens(TOKENS, window_tokens)
    assert seen == pytest.approx(one_sided if is_causal else 2 * one_sided - 1)
    assert mean_attended_tokens(TOKENS, None) == (TOKENS + 1) / 2


@pytest.mark.parametrize("positions", ["rope", "learned", "alibi", "none"])
@pytest.mark.parametrize(("num_past", "window_tokens"), [(0, None), (5, None), (2, 4), (7, 4)])
def test_the_sight_of_later_tokens_is_the_last_rows_of_the_whole(
    positions: str, num_past: int, window_tokens: int | None
) -> None:
    config = config_of(positions=positions, window_tokens=window_tokens)
    whole = build_sight(config, torch.zeros(1, TOKENS, 32), 0, Borders())
    num_kept = min(num_past, window_tokens or num_past)
    later = build_sight(config, torch.zeros(1, TOKENS - num_past, 32), num_past, Borders())
    if later.mask is None:
        assert later.is_causal == (num_past == 0)
    elif whole.mask is not None:
        first_key = num_past - num_kept
        assert torch.equal(later.mask, whole.mask[..., num_past:, first_key:])
    if later.rotation is not None and whole.rotation is not None:
        for part, full in zip(later.rotation, whole.rotation, strict=True):
            assert torch.equal(part, full[num_past:])


def test_rotation_multiplies_pairs_by_complex_phases(generator: torch.Generator) -> None:
    x_BHTK = torch.randn(2, 3, TOKENS, 8, generator=generator)
    pairs_BHTR = torch.complex(x_BHTK[..., :4].double(), x_BHTK[..., 4:].double())
    speeds_R = torch.tensor([10_000.0 ** (-2 * pair / 8) for pair in range(4)], dtype=torch.float64)
    phases_TR = torch.outer(torch.arange(TOKENS, dtype=torch.float64), speeds_R)
    turned_BHTR = pairs_BHTR * torch.polar(torch.ones_like(phases_TR), phases_TR)
    expected_BHTK = torch.cat((turned_BHTR.real, turned_BHTR.imag), dim=3).float()
    actual_BHTK = rotate(x_BHTK, rotary_table(torch.arange(TOKENS), 8, 10_000.0))
    torch.testing.assert_close(actual_BHTK, expected_BHTK, rtol=1e-5, atol=1e-6)


def test_rotated_scores_depend_on_the_distance_alone(generator: torch.Generator) -> None:
    query_K, key_K = torch.randn(2, 8, generator=generator)
    table = rotary_table(torch.arange(64), 8, 10_000.0)
    queries_TK = rotate(query_K.expand(1, 1, 64, 8), table)[0, 0]
    keys_TK = rotate(key_K.expand(1, 1, 64, 8), table)[0, 0]
    scores_TT = queries_TK @ keys_TK.T
    for distance in (0, 1, 17):
        diagonal = scores_TT.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert not torch.allclose(scores_TT[0, 0], scores_TT[17, 0], atol=1e-2)


def test_rotation_in_bf16_is_exact_but_for_the_last_rounding(generator: torch.Generator) -> None:
    x_BHTK = torch.randn(1, 1, 2048, 8, generator=generator).bfloat16()
    table = rotary_table(torch.arange(2048), 8, 10_000.0)
    rounded_BHTK = rotate(x_BHTK, table)
    assert rounded_BHTK.dtype == torch.bfloat16
    assert torch.equal(rounded_BHTK, rotate(x_BHTK.float(), table).bfloat16())


def test_alibi_slopes_are_the_published_ones() -> None:
    # Press et al. 2022, section 3, print those of 8 and of 16 heads.
    assert alibi_slopes(8) == [2.0**-power for power in range(1, 9)]
    assert alibi_slopes(16) == pytest.approx([2.0 ** (-power / 2) for power in range(1, 17)])
    # Twelve heads: those of 8, and every other one of 16.
    between = [2.0 ** (-power / 2) for power in (1, 3, 5, 7)]
    assert alibi_slopes(12) == pytest.approx([2.0**-power for power in range(1, 9)] + between)
    assert alibi_slopes(1) == [2.0**-8]
    for heads in range(1, 40):
        assert len(set(alibi_slopes(heads))) == heads


def test_the_kernel_takes_grouped_heads_as_repeated_ones(generator: torch.Generator) -> None:
    query = torch.randn(2, 6, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 5, 8, generator=generator)
    sight = Sight(mask=None, is_causal=True, rotation=None)
    repeated = (part.repeat_interleave(3, dim=1) for part in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, is_causal=True)
    torch.testing.assert_close(attend(query, key, value, sight), expected)
