"""What every model family promises, over every family of MODELS and the options that change it.

Shapes: `B` batch, `T` time, `V` vocabulary.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from pipeline.config.batching import IGNORED_LABEL
from pipeline.config.explain import known_families
from pipeline.config.model import ModelConfig
from pipeline.config.schema import DocumentsConfig
from pipeline.errors import ConfigError
from pipeline.models import MODELS, build_model
from pipeline.models.base import LanguageModel
from pipeline.models.documents import DocumentRule

VOCAB = 96
END = VOCAB - 1
"""Closes a document where a model keeps documents apart."""
TOKENS = 12
SIZE = {"width": 16, "depth": 2, "heads": 2, "max_positions": TOKENS}


def grid(**options: list[Any]) -> list[dict[str, Any]]:
    """Give every combination of the options' values."""
    return [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]


SHARED = {"norm": ["rmsnorm", "layernorm"], "activation": ["gelu", "swiglu"]}
VANILLA = {"backbone": "vanilla", "feed_forward": False, "init_std": 0.2}
GPT2 = {
    "positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "biases": True,
}  # fmt: skip
ARMS = {
    "gpt": [
        *grid(positions=["rope", "learned", "none", "alibi"], feed_forward_width=[None], **SHARED),
        *grid(positions=["rope", "alibi", "none"], window_tokens=[6], kv_heads=[1]),
        {"feed_forward_width": 20, "biases": True, "rope_base": 100.0},
        {"tied_head": False, "kv_heads": 1, "init_std": 0.01},
        {"qk_norm": True},
        {"qk_norm": True, "biases": True, "window_tokens": 6, "positions": "learned"},
        GPT2,
    ],
    "lstm_attention": [
        {**layers, **attention}
        for layers, attention in itertools.product(
            grid(feed_forward=[True, False], hidden_width=[None, 24], **SHARED),
            [
                {"attention": "none"},
                {"attention_after": "last"},
                {"attention_after": "second_last"},
                {"window_tokens": 4},
            ],
        )
    ]
    + [
        {**cell, **attention}
        for cell, attention in itertools.product(
            [{"cell": "gru"}, {"cell": "elman"}, {"cell": "min_lstm"}, VANILLA],
            [{"attention": "dot"}, {"attention": "additive", "window_tokens": 4}],
        )
    ]
    + [{"input_feeding": True, "attention": "dot"}, {"tied_head": False, "forget_bias": "chrono"}],
}
"""Family to its option combinations; a family without an entry runs with its defaults."""

EVERY_ARM = [(family, arm) for family in MODELS for arm in ARMS.get(family, [{}])]
DISTINCT_ARMS = [
    (family, arm)
    for family, arm in EVERY_ARM
    if arm.get("norm", "rmsnorm") == "rmsnorm" and arm.get("activation", "swiglu") == "swiglu"
] + [(family, {"norm": "layernorm", "activation": "gelu"}) for family in MODELS]
DISTINCT_ARMS.append(("gpt", GPT2))
"""Both normalisations and activations once, everything else in full."""


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={option}" for key, option in value.items()) or "defaults"
    return str(value)


def make(family: str, switches: DocumentsConfig | None = None, **fields: Any) -> LanguageModel:
    rule = None if switches is None else DocumentRule(end_of_document_id=END, switches=switches)
    return build_model(config_of(family, **fields), VOCAB, seed=0, documents=rule)


def config_of(family: str, **fields: Any) -> Any:
    return TypeAdapter(ModelConfig).validate_python({"family": family, **SIZE, **fields})


def num_steps(arm: dict[str, Any]) -> int:
    """Give the steps in which a batch is learnt; a plain stack is slower."""
    return 80 if arm.get("backbone") == "vanilla" else 35


def random_tokens(num_samples: int, num_tokens: int = TOKENS, vocab_size: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(vocab_size, (num_samples, num_tokens), generator=generator)


DOCUMENTS_APART = DocumentsConfig(reset_positions=True, mask_attention=True, reset_state=True)

every_arm = pytest.mark.parametrize(("family", "arm"), EVERY_ARM, ids=name_of)
distinct_arms = pytest.mark.parametrize(("family", "arm"), DISTINCT_ARMS, ids=name_of)
every_family = pytest.mark.parametrize("family", MODELS)


def test_every_family_that_a_config_can_name_is_registered() -> None:
    assert set(MODELS) == set(known_families())


@every_arm
def test_closed_form_parameter_count_equals_the_counted_one(
    family: str, arm: dict[str, Any]
) -> None:
    model = make(family, **arm)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    tables = sum(counts.get(name, 0) for name in ("embedding_VD", "positions_PD", "head_VD"))
    closed = config_of(family, **arm).num_parameters(VOCAB)
    assert closed.total == sum(counts.values())
    assert closed.non_embedding == sum(counts.values()) - tables


@distinct_arms
def test_a_changed_token_leaves_earlier_logits_and_changes_later_ones(
    family: str, arm: dict[str, Any]
) -> None:
    model, changed = make(family, **arm), TOKENS // 2
    inputs_BT = random_tokens(2)
    other_BT = inputs_BT.clone()
    other_BT[:, changed] = (other_BT[:, changed] + 1) % VOCAB
    with torch.no_grad():
        shift_BT = (model.logits(inputs_BT) - model.logits(other_BT)).abs().amax(dim=2)
    assert shift_BT[:, :changed].max() == 0.0
    assert shift_BT[:, changed:].min() > 0.0


@distinct_arms
def test_documents_kept_apart_do_not_see_each_other(family: str, arm: dict[str, Any]) -> None:
    inputs_BT = random_tokens(2, vocab_size=END - 1)
    inputs_BT[:, [4, 8]] = END
    labels_BT = random_tokens(2)
    other_BT = inputs_BT.clone()
    other_BT[:, 2] += 1
    shifts = []
    for switches in (DOCUMENTS_APART, DocumentsConfig()):
        model = make(family, switches, **arm)
        with torch.no_grad():
            shifts.append((model(inputs_BT, labels_BT) - model(other_BT, labels_BT)).abs())
    apart_BT, together_BT = shifts
    # The second and third documents begin at 5 and 9.
    assert apart_BT[:, 5:].max() == apart_BT[:, :2].max() == 0.0
    assert apart_BT[:, 2:5].min() > 0.0
    assert together_BT[:, 2:].min() > 0.0


@distinct_arms
def test_documents_kept_apart_give_every_parameter_a_gradient(
    family: str, arm: dict[str, Any]
) -> None:
    model = make(family, DOCUMENTS_APART, **arm)
    tokens = random_tokens(2, TOKENS + 1, vocab_size=END - 1)
    tokens[:, [4, 8]] = END
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@distinct_arms
def test_initial_loss_is_the_log_of_the_vocabulary(family: str, arm: dict[str, Any]) -> None:
    tokens = random_tokens(16, TOKENS + 1)
    model = make(family, **{**arm, "width": 64})
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean().item()
    assert loss == pytest.approx(math.log(VOCAB), abs=0.1)


@distinct_arms
@pytest.mark.parametrize("cuts", [[1] * TOKENS, [5, 1, 1, 5], [TOKENS]], ids=str)
def test_cached_generation_equals_recomputation_and_keeps_what_the_arithmetic_says(
    family: str, arm: dict[str, Any], cuts: list[int]
) -> None:
    model, tokens, config = make(family, **arm).eval(), random_tokens(2), config_of(family, **arm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() == 2 else 1.0)  # no even attention
        expected_BTV, cache, pieces = model.logits(tokens), model.start(2), []
        for piece_BT in tokens.split(cuts, dim=1):
            pieces.append(model.extend(piece_BT, cache))
            per_text = config.generation_state_bytes(cache.num_tokens, bytes_per_value=4)
            assert cache.num_bytes == 2 * per_text
    assert cache.num_tokens == TOKENS
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected_BTV, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=f"model.max_positions={TOKENS}"):
        model.extend(tokens[:, :1], cache)


@every_family
@pytest.mark.parametrize("width", [256, 1024])
@pytest.mark.parametrize("depth", [1, 3])
def test_initial_loss_is_the_log_of_the_vocabulary_at_every_width(
    family: str, width: int, depth: int
) -> None:
    config = config_of(family, width=width, depth=depth, heads=8)
    tokens = random_tokens(16, TOKENS + 1, vocab_size=2048)
    with torch.no_grad():
        loss = build_model(config, 2048, seed=1)(tokens[:, :-1], tokens[:, 1:]).mean().item()
    assert loss == pytest.approx(math.log(2048), abs=0.1)


@distinct_arms
def test_one_repeated_batch_is_learnt(family: str, arm: dict[str, Any]) -> None:
    model = make(family, **{**arm, "width": 32})
    tokens = random_tokens(2, TOKENS + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(num_steps(arm)):
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * math.log(VOCAB)


@distinct_arms
def test_gradients_reach_every_parameter(family: str, arm: dict[str, Any]) -> None:
    model, tokens = make(family, **arm), random_tokens(2, TOKENS + 1)
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert silent == []


@distinct_arms
def test_every_parameter_is_drawn_by_initialize(family: str, arm: dict[str, Any]) -> None:
    model = make(family, **arm)
    drawn = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.initialize(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, drawn[name]), name


@every_family
def test_weights_depend_on_the_seed_alone_and_leave_the_global_state(family: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(family).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = make(family).state_dict()
    other = build_model(config_of(family), VOCAB, seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding_VD"], other["embedding_VD"])


@every_family
def test_a_model_keeps_no_buffers(family: str) -> None:
    assert list(make(family).buffers()) == []


@every_family
def test_token_losses_are_float32_nats_and_zero_where_ignored(family: str) -> None:
    model, tokens = make(family), random_tokens(2, TOKENS + 1)
    inputs_BT, labels_BT = tokens[:, :-1], tokens[:, 1:].clone()
    labels_BT[0, 3:] = IGNORED_LABEL
    with torch.no_grad():
        losses_BT = model(inputs_BT, labels_BT)
        logs_BTV = model(inputs_BT).double().log_softmax(dim=2)
    picked_BT = -logs_BTV.gather(2, labels_BT.clamp(min=0).unsqueeze(2)).squeeze(2)
    assert losses_BT.dtype == torch.float32
    torch.testing.assert_close(losses_BT[1].double(), picked_BT[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(losses_BT[0, 3:], torch.zeros(TOKENS - 3))


@every_family
def test_an_input_beyond_the_positions_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=f"model.max_positions={TOKENS}"):
        make(family)(random_tokens(1, TOKENS + 1))


@every_family
def test_the_table_is_padded_to_the_configured_vocabulary(family: str) -> None:
    assert make(family, vocab_size=128).embedding_VD.shape[0] == 128
    with pytest.raises(ConfigError, match="nearest: 96"):
        make(family, vocab_size=95)


@every_family
def test_bf16_stays_close_to_fp32(family: str) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16 instructions, which nn.LSTM needs")
    config = config_of(family, width=64, max_positions=512)
    tokens = random_tokens(2, 513)
    with torch.no_grad():
        exact_BT = build_model(config, VOCAB, seed=0)(tokens[:, :-1], tokens[:, 1:])
        rounded_BT = build_model(config, VOCAB, seed=0).bfloat16()(tokens[:, :-1], tokens[:, 1:])
    assert rounded_BT.dtype == torch.float32
    # bf16 keeps 8 bits, 0.4%; logits reach 1.3, and a loss is a difference of two of them.
    torch.testing.assert_close(rounded_BT, exact_BT, rtol=0.0, atol=0.03)
