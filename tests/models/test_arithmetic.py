"""Closed forms of the Transformer against counting on the built model.

The counter of FLOPs sees matrix products only and counts all T^2 scores of math attention, also
those that the mask removes; the closed form counts the scores that are needed.
"""

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.gpt import GptConfig
from pipeline.config.gpt_presets import PRESETS, PresetName
from pipeline.config.model_base import mean_attended_tokens
from pipeline.config.schema import TrainConfig
from pipeline.models import build_model
from pipeline.models.execution import set_execution
from tests.models.counting import ProductChain, saved_bytes

VOCAB = 40
SIZE = {"width": 16, "depth": 2, "heads": 2}
TOKENS, SAMPLES = 7, 3
OPTIONS: list[dict[str, Any]] = [
    {},
    {"feed_forward_width": 20, "activation": "gelu"},
    {"kv_heads": 1, "tied_head": False},
    {"biases": True, "norm": "layernorm", "activation": "gelu_tanh"},
    {"qk_norm": True, "kv_heads": 1},
    {"window_tokens": 3, "biases": True},
    {"causal": False},
    {"causal": False, "window_tokens": 3},
    {"dropout": 0.1, "depth": 3},
]
GPTS = [
    GptConfig.model_validate({**SIZE, "positions": positions, **options})
    for positions, options in itertools.product(("rope", "learned", "none", "alibi"), OPTIONS)
]
every_gpt = pytest.mark.parametrize(
    "config",
    GPTS,
    ids=lambda config: ",".join(map(str, config.model_dump(exclude_defaults=True).values())),
)


def tokens_of(num_samples: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB, (num_samples, TOKENS + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@every_gpt
def test_flops_equal_the_counted_products(config: GptConfig) -> None:
    model = build_model(config, VOCAB, seed=0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(tokens_of(SAMPLES)[0]).sum().backward()
    counted = counter.get_total_flops() / (SAMPLES * TOKENS)
    attended = mean_attended_tokens(TOKENS, config.window_tokens)
    if not config.causal:
        attended = 2 * attended - 1
    # Scores and their use: 2 products of 2 FLOPs, run once forward and twice backward.
    masked = 3 * 2 * 2 * config.width * config.depth * (TOKENS - attended)
    assert config.flops_per_token(VOCAB, TOKENS) + masked == pytest.approx(counted, rel=1e-12)
    if config.window_tokens is None:
        assert config.flops_per_token(VOCAB, TOKENS, "palm") == pytest.approx(counted, rel=1e-12)


def test_palm_flops_are_those_of_the_paper() -> None:
    # Chowdhery et al. 2022, appendix B: 6 N + 12 L H Q T, N with the head and without the table.
    config = GptConfig(width=768, depth=12, heads=12, activation="gelu", norm="layernorm")
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert config.flops_per_token(50257, 1024, "palm") == 6 * matrices + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("window_tokens", "attended"), [(None, 1024), (1, 1), (100, 199), (512, 1023), (513, 1024)]
)
def test_palm_flops_of_a_window_to_both_sides_are_those_of_all_that_it_spans(
    window_tokens: int | None, attended: int
) -> None:
    config = GptConfig(causal=False, window_tokens=window_tokens)
    free = GptConfig(causal=False)
    scores = 12 * free.depth * free.width  # scores and their use, 2 FLOPs, three passes
    expected = free.flops_per_token(0, 1024, "palm") - scores * (1024 - attended)
    assert config.flops_per_token(0, 1024, "palm") == expected


@every_gpt
def test_dependent_products_equal_the_traced_chain(config: GptConfig) -> None:
    model = build_model(config, VOCAB, seed=0)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), ProductChain() as chain:
        logits_BTV = model.logits(tokens_of(1)[0])
    assert config.dependent_products(TOKENS) == chain.of(logits_BTV)


@every_gpt
@pytest.mark.parametrize("again", [False, True])
def test_activation_bytes_equal_what_autograd_holds(config: GptConfig, again: bool) -> None:
    model = build_model(config, VOCAB, seed=0)
    set_execution(model, TrainConfig(activation_checkpointing=again))
    expected = config.activation_bytes(SAMPLES, TOKENS, VOCAB, 4, activation_checkpointing=again)
    assert expected == saved_bytes(model, *tokens_of(SAMPLES))


GPT2_SIZES = {
    # Numbers in the released weights.
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
}
LLAMA_SIZES = {
    "llama_1b": (128_256, 1_235_814_400),
    "llama_3b": (128_256, 3_212_749_824),
    "llama_7b": (32_000, 6_738_415_616),
}
OWN_SIZES = {
    # Outside the table, from 4 d^2 + 3 d f + 2 d a block and d of the final norm.
    "llama_1m": 5 * (4 * 128**2 + 3 * 128 * 344 + 2 * 128) + 128,
    "llama_3m": 4 * (4 * 256**2 + 3 * 256 * 680 + 2 * 256) + 256,
    "llama_10m": 6 * (4 * 384**2 + 3 * 384 * 1024 + 2 * 384) + 384,
    "llama_30m": 10 * (4 * 512**2 + 3 * 512 * 1368 + 2 * 512) + 512,
    "llama_100m": 14 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768,
    "llama_300m": 24 * (4 * 1024**2 + 3 * 1024 * 2728 + 2 * 1024) + 1024,
}


def test_presets_have_their_published_sizes() -> None:
    assert set(PRESETS) == set(get_args(PresetName)) == {*GPT2_SIZES, *LLAMA_SIZES, *OWN_SIZES}
    for name, total in GPT2_SIZES.items():
        assert GptConfig.model_validate({"preset": name}).num_parameters(50257).total == total
    for name, (vocab_size, total) in LLAMA_SIZES.items():
        assert GptConfig.model_validate({"preset": name}).num_parameters(vocab_size).total == total
    for name, non_embedding in OWN_SIZES.items():
        config = GptConfig.model_validate({"preset": name})
        assert config.num_parameters(256).non_embedding == non_embedding
        assert non_embedding == pytest.approx(1e6 * int(name[6:-1]), rel=0.07)


def test_a_field_beside_a_preset_wins_and_a_resolved_config_reads_back_the_same() -> None:
    config = GptConfig.model_validate({"preset": "gpt2_124m", "depth": 3, "max_positions": 256})
    assert (config.depth, config.max_positions, config.width) == (3, 256, 768)
    assert config.biases
    assert GptConfig.model_validate(config.model_dump(mode="json")) == config
