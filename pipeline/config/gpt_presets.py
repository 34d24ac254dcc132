"""Shapes of Transformers that are known by name, from 1M to 7B parameters.

Those like Llama below 1B are named by their parameters outside the embedding, the others as
published. None fixes the vocabulary, which is the tokenizer's.
"""

from typing import Any, Literal

PresetName = Literal[
    "gpt2_124m", "gpt2_355m", "gpt2_774m", "gpt2_1558m",
    "llama_1m", "llama_3m", "llama_10m", "llama_30m", "llama_100m", "llama_300m",
    "llama_1b", "llama_3b", "llama_7b",
]  # fmt: skip
"""Every preset, as a config names it."""

GPT2 = {
    "positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "biases": True,
    "max_positions": 1024,
}  # fmt: skip
"""What all sizes of GPT-2 share. Source: Radford et al. 2019, table 2 and released code."""

LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu"}
"""What all sizes like Llama share. Source: Touvron et al. 2023a, section 2.2."""

LLAMA32 = {
    **LLAMA, "kv_heads": 8, "feed_forward_width": 8192, "rope_base": 500_000.0,
    "max_positions": 8192,
}  # fmt: skip
"""What the two smallest of Llama 3.2 share, whose context is longer by scaled rotations that are
not built here. Source: their released configs."""

PRESETS: dict[PresetName, dict[str, Any]] = {
    "gpt2_124m": {**GPT2, "width": 768, "depth": 12, "heads": 12},
    "gpt2_355m": {**GPT2, "width": 1024, "depth": 24, "heads": 16},
    "gpt2_774m": {**GPT2, "width": 1280, "depth": 36, "heads": 20},
    "gpt2_1558m": {**GPT2, "width": 1600, "depth": 48, "heads": 25},
    "llama_1m": {**LLAMA, "width": 128, "depth": 5, "heads": 4, "max_positions": 2048},
    "llama_3m": {**LLAMA, "width": 256, "depth": 4, "heads": 4, "max_positions": 2048},
    "llama_10m": {**LLAMA, "width": 384, "depth": 6, "heads": 6, "max_positions": 2048},
    "llama_30m": {**LLAMA, "width": 512, "depth": 10, "heads": 8, "max_positions": 2048},
    "llama_100m": {**LLAMA, "width": 768, "depth": 14, "heads": 12, "max_positions": 2048},
    "llama_300m": {**LLAMA, "width": 1024, "depth": 24, "heads": 16, "max_positions": 2048},
    "llama_1b": {**LLAMA32, "width": 2048, "depth": 16, "heads": 32},
    "llama_3b": {**LLAMA32, "width": 3072, "depth": 28, "heads": 24},
    "llama_7b": {
        **LLAMA, "width": 4096, "depth": 32, "heads": 32, "feed_forward_width": 11008,
        "tied_head": False, "max_positions": 4096,
    },
}  # fmt: skip
"""Preset name to the fields that differ from the defaults. Source of `llama_7b`: Touvron et al.
2023b (Llama 2); of the sizes below 1B: depth and width of this project, heads of 64 from 3M up."""
