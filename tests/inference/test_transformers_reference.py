"""Our GPT beside Llama and GPT-2 of `transformers`, whose weights are drawn at random."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.errors import CheckpointError
from pipeline.inference.transformers_config import from_config, obstacles, to_config
from pipeline.inference.transformers_names import (
    Architecture,
    from_transformers,
    rules,
    their_shapes,
    to_transformers,
)
from pipeline.models import build_model
from pipeline.models.base import LanguageModel

VOCAB_ROWS = 53
LLAMA = {
    "vocab_size": VOCAB_ROWS, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "attention_dropout": 0.0,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB_ROWS, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
CASES: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama with grouped queries": ("llama", LLAMA | {"num_key_value_heads": 2}),
    "llama with one head of keys": ("llama", LLAMA | {"num_key_value_heads": 1}),
    "llama tied, base 5e5": (
        "llama",
        LLAMA
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
    ),
    "llama with biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied, exact gelu": (
        "gpt2",
        GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 56},
    ),
}
INPUTS_BT = torch.randint(0, VOCAB_ROWS, (3, 17), generator=torch.Generator().manual_seed(3))


def build_theirs(architecture: Architecture, fields: dict[str, Any]) -> Any:
    torch.manual_seed(11)
    if architecture == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**fields))
    else:
        model = GPT2LMHeadModel(GPT2Config(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Their start has ones and zeros where a wrong mapping would not show.
            centre = 1.0 if "norm" in name or ".ln_" in name else 0.0
            if centre or name.endswith("bias"):
                parameter.normal_(centre, 0.2)
            else:
                parameter.normal_(0.0, 0.15)
    return model.eval()


def build_ours(architecture: Architecture, theirs: Any) -> tuple[LanguageModel, list[Any]]:
    kind, config = from_config(theirs.config.to_dict(), "config.json")
    assert kind == architecture
    mapping = rules(kind, config)
    ours = build_model(config, theirs.config.vocab_size, seed=0)
    state = from_transformers(theirs.state_dict(), mapping)
    ours.load_state_dict(state)
    return ours, mapping


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Architecture, Any]:
    architecture, fields = CASES[request.param]
    return architecture, build_theirs(architecture, fields)


def test_logits_are_equal(case: tuple[Architecture, Any]) -> None:
    architecture, theirs = case
    ours, _ = build_ours(architecture, theirs)
    with torch.no_grad():
        expected = theirs(INPUTS_BT).logits
        found = ours.logits(INPUTS_BT)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_gradients_are_equal_and_map_by_the_same_rules(case: tuple[Architecture, Any]) -> None:
    architecture, theirs = case
    ours, mapping = build_ours(architecture, theirs)
    labels_BT = INPUTS_BT.roll(-1, dims=1)
    ours(INPUTS_BT, labels_BT).mean().backward()
    logits_NV = theirs(INPUTS_BT).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits_NV, labels_BT.flatten()).backward()
    expected = gradients(theirs)
    found = to_transformers(gradients(ours), mapping)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert float(gradient.abs().max()) > 1e-6, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_names_and_layouts_map_back_without_a_change(case: tuple[Architecture, Any]) -> None:
    architecture, theirs = case
    ours, mapping = build_ours(architecture, theirs)
    back = to_transformers(dict(ours.named_parameters()), mapping)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(back[name], parameter), name
    shapes = their_shapes({n: tuple(p.shape) for n, p in ours.named_parameters()}, mapping)
    assert shapes == {n: tuple(p.shape) for n, p in theirs.named_parameters()}


def test_a_config_maps_there_and_back(case: tuple[Architecture, Any]) -> None:
    architecture, theirs = case
    _, config = from_config(theirs.config.to_dict(), "config.json")
    assert obstacles(architecture, config) == []
    assert from_config(to_config(architecture, config, VOCAB_ROWS), "back") == (
        architecture,
        config,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "legal: llama, gpt2, tandem"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"num_key_value_heads": 3}, "kv_heads=3"),
        ({"hidden_size": None}, "config.json"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads=0; legal: whole numbers"),
        ({"num_attention_heads": "4"}, "config.json: num_attention_heads='4'"),
        ({"vocab_size": True}, "config.json: vocab_size=True"),
        ({"rope_parameters": [1]}, "config.json: rope_parameters=[1]; legal: an object"),
        ({"model_type": "gpt2", **GPT2, "n_head": -4}, "config.json: n_head=-4"),
    ],
)
def test_a_config_that_we_cannot_build_is_refused(fields: dict[str, Any], message: str) -> None:
    tree = {"model_type": "llama", **LLAMA} | fields
    with pytest.raises(CheckpointError) as refusal:
        from_config({k: v for k, v in tree.items() if v is not None}, "config.json")
    assert message in str(refusal.value)
