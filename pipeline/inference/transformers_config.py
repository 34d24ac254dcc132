"""Between `GptConfig` and the config.json of Llama and GPT-2, where both say the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from pipeline.config.gpt import GptConfig
from pipeline.errors import CheckpointError
from pipeline.inference.transformers_names import Architecture

GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}
"""Their names of the feed-forward activations that we have."""
LLAMA_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
GPT2_COUNTS = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")
"""Fields that both need, and that sizes are computed from."""


def obstacles(architecture: Architecture, config: GptConfig) -> list[str]:
    """Say which fields of a config an architecture cannot express; none if it is exact.

    Dropout and z-loss count only in training and are left out.
    """
    wanted: dict[str, tuple[object, ...]] = {
        "qk_norm": (False,),
        "window_tokens": (None, config.max_positions),
        "causal": (True,),
    }
    if architecture == "llama":
        wanted |= {"positions": ("rope",), "norm": ("rmsnorm",), "activation": ("swiglu",)}
    else:
        wanted |= {
            "positions": ("learned",),
            "norm": ("layernorm",),
            "activation": ("gelu", "gelu_tanh"),
            "biases": (True,),
            "kv_heads": (None, config.heads),
        }
    return [
        f"model.{field}={getattr(config, field)} (legal: {', '.join(map(str, legal))})"
        for field, legal in wanted.items()
        if getattr(config, field) not in legal
    ]


def to_config(architecture: Architecture, config: GptConfig, vocab_rows: int) -> dict[str, Any]:
    """Give the fields of config.json for a config without obstacles.

    Args:
        architecture: Whose config.
        config: Ours.
        vocab_rows: Rows V of the embedding table.
    """
    if architecture == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": vocab_rows,
            "n_positions": config.max_positions,
            "n_embd": config.width,
            "n_layer": config.depth,
            "n_head": config.heads,
            "n_inner": config.resolved_feed_forward_width,
            "activation_function": ("gelu" if config.activation == "gelu" else "gelu_pytorch_tanh"),
            "layer_norm_epsilon": config.norm_epsilon,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": config.tied_head,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_rows,
        "hidden_size": config.width,
        "intermediate_size": config.resolved_feed_forward_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.resolved_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": config.biases,
        "mlp_bias": config.biases,
        "tie_word_embeddings": config.tied_head,
    }


def from_config(tree: Mapping[str, Any], origin: str) -> tuple[Architecture, GptConfig]:
    """Give our config of a Llama or GPT-2.

    Args:
        tree: The fields of config.json.
        origin: What to name in an error.

    Raises:
        CheckpointError: It is another architecture, lacks a field, or has an option that we do not.
    """
    kind = tree.get("model_type")
    if kind not in ("llama", "gpt2"):
        raise CheckpointError(f"{origin}: model_type={kind!r}; legal: llama, gpt2, tandem")
    try:
        fields = _from_llama(tree, origin) if kind == "llama" else _from_gpt2(tree, origin)
        return kind, GptConfig.model_validate(fields)
    except KeyError as exc:
        raise CheckpointError(f"{origin} lacks the field {exc}") from exc
    except ValidationError as exc:
        raise CheckpointError(f"{origin} describes no model that we can build: {exc}") from exc


def require_counts(tree: Mapping[str, Any], fields: Sequence[str], origin: str) -> None:
    """Refuse a config whose sizes are no sizes.

    Raises:
        CheckpointError: A field is there and no whole number from 1; it is named.
        KeyError: A field is missing.
    """
    for field in fields:
        value = tree[field]
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{origin}: {field}={value!r}; legal: whole numbers from 1")


def _from_llama(tree: Mapping[str, Any], origin: str) -> dict[str, Any]:
    require_counts(tree, LLAMA_COUNTS, origin)
    rope_field = "rope_parameters" if tree.get("rope_parameters") else "rope_scaling"
    rope = tree.get(rope_field) or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{origin}: {rope_field}={rope!r}; legal: an object, or null")
    head_dim = tree.get("head_dim") or tree["hidden_size"] // tree["num_attention_heads"]
    biases = tree.get("attention_bias", False)
    _refuse_others(
        origin,
        {
            "hidden_act": (tree.get("hidden_act", "silu"), ("silu", "swish")),
            "rope_type": (rope.get("rope_type", rope.get("type", "default")), ("default",)),
            "head_dim": (head_dim, (tree["hidden_size"] // tree["num_attention_heads"],)),
            "mlp_bias": (tree.get("mlp_bias", False), (biases,)),
        },
    )
    return {
        "positions": "rope",
        "rope_base": rope.get("rope_theta", tree.get("rope_theta", 10_000.0)),
        "norm": "rmsnorm",
        "activation": "swiglu",
        "width": tree["hidden_size"],
        "depth": tree["num_hidden_layers"],
        "heads": tree["num_attention_heads"],
        "kv_heads": tree.get("num_key_value_heads"),
        "feed_forward_width": tree["intermediate_size"],
        "max_positions": tree["max_position_embeddings"],
        "norm_epsilon": tree.get("rms_norm_eps", 1e-6),
        "biases": biases,
        "tied_head": tree.get("tie_word_embeddings", False),
        "vocab_size": tree["vocab_size"],
    }


def _from_gpt2(tree: Mapping[str, Any], origin: str) -> dict[str, Any]:
    require_counts(tree, GPT2_COUNTS, origin)
    activation = tree.get("activation_function", "gelu_new")
    _refuse_others(
        origin,
        {
            "activation_function": (activation, tuple(GPT2_ACTIVATIONS)),
            "scale_attn_weights": (tree.get("scale_attn_weights", True), (True,)),
            "scale_attn_by_inverse_layer_idx": (
                tree.get("scale_attn_by_inverse_layer_idx", False), (False,),
            ),
            "add_cross_attention": (tree.get("add_cross_attention", False), (False,)),
        },
    )  # fmt: skip
    return {
        "positions": "learned",
        "norm": "layernorm",
        "activation": GPT2_ACTIVATIONS[activation],
        "biases": True,
        "width": tree["n_embd"],
        "depth": tree["n_layer"],
        "heads": tree["n_head"],
        "feed_forward_width": tree.get("n_inner") or 4 * tree["n_embd"],
        "max_positions": tree["n_positions"],
        "norm_epsilon": tree.get("layer_norm_epsilon", 1e-5),
        "tied_head": tree.get("tie_word_embeddings", True),
        "vocab_size": tree["vocab_size"],
    }


def _refuse_others(origin: str, found: Mapping[str, tuple[object, tuple[object, ...]]]) -> None:
    wrong = [
        f"{field}={value!r} (legal: {', '.join(map(str, legal))})"
        for field, (value, legal) in found.items()
        if value not in legal
    ]
    if wrong:
        raise CheckpointError(f"{origin} has options that our models do not: {'; '.join(wrong)}")
