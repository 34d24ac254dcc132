"""Between our parameter names and layouts and those of Llama and GPT-2 in `transformers`.

Every rule is a cut, a joining or a transposition, so gradients map by the same rules as weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.config.gpt import GptConfig

Architecture = Literal["llama", "gpt2"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One parameter of ours, and the ones that hold the same numbers there."""

    ours: str
    theirs: tuple[str, ...]
    """Names, in the order of our rows."""
    rows: tuple[int, ...] = ()
    """Rows of ours that each of several takes; empty for one."""
    is_transposed: bool = False
    """Whether theirs is [in, out], as in the Conv1D of GPT-2; ours is [out, in]."""


def rules(architecture: Architecture, config: GptConfig) -> list[Rule]:
    """Give the rule of every parameter of a model."""
    build = _llama_rules if architecture == "llama" else _gpt2_rules
    return build(config)


def to_transformers(tensors: Mapping[str, Tensor], mapping: Sequence[Rule]) -> dict[str, Tensor]:
    """Give our tensors under the names and in the layouts of `transformers`."""
    result: dict[str, Tensor] = {}
    for rule in mapping:
        tensor = tensors[rule.ours]
        parts = torch.split(tensor, list(rule.rows)) if rule.rows else (tensor,)
        for name, part in zip(rule.theirs, parts, strict=True):
            result[name] = (part.T if rule.is_transposed else part).contiguous()
    return result


def from_transformers(tensors: Mapping[str, Tensor], mapping: Sequence[Rule]) -> dict[str, Tensor]:
    """Give tensors of `transformers` under our names and in our layouts."""
    result: dict[str, Tensor] = {}
    for rule in mapping:
        parts = [tensors[name] for name in rule.theirs]
        if rule.is_transposed:
            parts = [part.T for part in parts]
        result[rule.ours] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return result


def their_shapes(
    shapes: Mapping[str, tuple[int, ...]], mapping: Sequence[Rule]
) -> dict[str, tuple[int, ...]]:
    """Give the shapes that files of `transformers` must have, from those of our parameters."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tuple(part.shape) for name, part in to_transformers(empty, mapping).items()}


def _llama_rules(config: GptConfig) -> list[Rule]:
    kv_rows = config.resolved_kv_heads * config.head_width
    ours = [
        Rule(ours="embedding_VD", theirs=("model.embed_tokens.weight",)),
        Rule(ours="final_norm.weight", theirs=("model.norm.weight",)),
    ]
    if not config.tied_head:
        ours.append(Rule(ours="head_VD", theirs=("lm_head.weight",)))
    hidden = config.resolved_feed_forward_width
    for index in range(config.depth):
        own, their = f"blocks.{index}", f"model.layers.{index}"
        ours += [
            Rule(ours=f"{own}.attention_norm.weight", theirs=(f"{their}.input_layernorm.weight",)),
            Rule(
                ours=f"{own}.feed_forward_norm.weight",
                theirs=(f"{their}.post_attention_layernorm.weight",),
            ),
        ]
        for kind in ("weight", "bias") if config.biases else ("weight",):
            ours += [
                Rule(
                    ours=f"{own}.attention.qkv.{kind}",
                    theirs=tuple(f"{their}.self_attn.{part}_proj.{kind}" for part in "qkv"),
                    rows=(config.width, kv_rows, kv_rows),
                ),
                Rule(
                    ours=f"{own}.attention.out.{kind}",
                    theirs=(f"{their}.self_attn.o_proj.{kind}",),
                ),
                Rule(
                    ours=f"{own}.feed_forward.up.{kind}",
                    theirs=(f"{their}.mlp.gate_proj.{kind}", f"{their}.mlp.up_proj.{kind}"),
                    rows=(hidden, hidden),
                ),
                Rule(
                    ours=f"{own}.feed_forward.down.{kind}",
                    theirs=(f"{their}.mlp.down_proj.{kind}",),
                ),
            ]
    return ours


GPT2_MATRICES = {
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
GPT2_NORMS = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}


def _gpt2_rules(config: GptConfig) -> list[Rule]:
    ours = [
        Rule(ours="embedding_VD", theirs=("transformer.wte.weight",)),
        Rule(ours="positions_PD", theirs=("transformer.wpe.weight",)),
    ]
    if not config.tied_head:
        ours.append(Rule(ours="head_VD", theirs=("lm_head.weight",)))
    for kind in ("weight", "bias"):
        ours.append(Rule(ours=f"final_norm.{kind}", theirs=(f"transformer.ln_f.{kind}",)))
    for index in range(config.depth):
        for kind in ("weight", "bias"):
            for own, their in (GPT2_NORMS | GPT2_MATRICES).items():
                ours.append(
                    Rule(
                        ours=f"blocks.{index}.{own}.{kind}",
                        theirs=(f"transformer.h.{index}.{their}.{kind}",),
                        is_transposed=kind == "weight" and own in GPT2_MATRICES,
                    )
                )
    return ours
