"""What the configs of all model families share: fields, rules and the parts of their arithmetic.

Symbols: `d` width, `L` depth, `T` sequence tokens, `V` vocabulary, `f` feed-forward width.
Every formula is tested against counting on the built model.
"""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import ConfigError

TRAINING_PASSES = 3
"""Forward is one pass over the products, backward two. Source: Kaplan et al. 2020, section 2.1."""


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Number of parameters, with and without the embedding tables."""

    total: int
    non_embedding: int


class ModelBase(BaseModel):
    """Fields and rules that every model family shares."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    width: int = Field(default=128, ge=1)
    """Width d of the embedding and the residual stream."""
    depth: int = Field(default=4, ge=1)
    """Number of layers L."""
    heads: int = Field(default=4, ge=1)
    """Number of attention heads; divides the width, where attention has heads."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Rows of the embedding table; None takes the tokenizer's size, a larger value pads it."""
    max_positions: int = Field(default=1024, ge=1)
    """Longest sequence, in tokens, that the model accepts."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before each sub-layer; rmsnorm has a gain only, layernorm a gain and a bias."""
    norm_epsilon: float = Field(default=1e-5, gt=0.0)
    """Added to the mean square. Stated, because torch's own default differs between the two kinds.
    Source: Touvron et al. 2023, released code."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "swiglu"
    """Feed-forward activation; swiglu has three matrices, the others two. GPT-2 has gelu_tanh, the
    approximation of gelu (Hendrycks and Gimpel 2016, section 2)."""
    feed_forward_width: int | None = Field(default=None, ge=1)
    """Hidden width f of the feed-forward sub-layer; None takes 4d, and about 8d/3 for
    swiglu, so that all have close to 8 d^2 parameters (Shazeer 2020, section 2)."""
    tied_head: bool = True
    """Whether the head is the embedding table (Press and Wolf 2017); False gives it V x d
    parameters of its own."""
    init_std: float = Field(default=0.02, gt=0.0)
    """Standard deviation of matrices at the start (Radford et al. 2019, released code)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the embedded tokens, learned positions included, and of each sub-layer's output that
    training zeroes (Radford et al. 2019, released code); 0, because pretraining rarely sees a token
    twice."""
    z_loss: float = Field(default=0.0, ge=0.0)
    """Weight of the squared log of the softmax's denominator in the loss, which keeps logits from
    drifting (Chowdhery et al. 2022, section 5: 1e-4); 0 leaves it out."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.has_heads and self.width % self.heads:
            low = self.width - self.width % self.heads
            near = [w for w in (low, low + self.heads) if w > 0]
            raise ValueError(
                f"width={self.width} is not a multiple of heads={self.heads}; "
                f"nearest width: {' or '.join(map(str, near))}"
            )
        return self

    def resolved_vocab_size(self, tokenizer_entries: int) -> int:
        """Rows V of the embedding table for a tokenizer.

        Args:
            tokenizer_entries: Number of token ids that can occur.

        Raises:
            ConfigError: `vocab_size` is smaller than the tokenizer.
        """
        if self.vocab_size is not None and self.vocab_size < tokenizer_entries:
            raise ConfigError(
                f"model.vocab_size={self.vocab_size} is smaller than the tokenizer's "
                f"{tokenizer_entries} entries; nearest: {tokenizer_entries}, or null to follow it"
            )
        return self.vocab_size if self.vocab_size is not None else tokenizer_entries

    @property
    def has_heads(self) -> bool:
        """Whether attention is cut into heads."""
        return True

    @property
    def is_compilable(self) -> bool:
        """Whether any part of the model gets faster by `torch.compile`."""
        return True

    @property
    def head_width(self) -> int:
        """Width K of one attention head."""
        return self.width // self.heads

    @property
    def resolved_feed_forward_width(self) -> int:
        """Hidden width f of the feed-forward sub-layer with the default filled in."""
        if self.feed_forward_width is not None:
            return self.feed_forward_width
        if self.activation == "swiglu":
            return max(8, round(8 * self.width / 3 / 8) * 8)
        return 4 * self.width

    @property
    def norm_parameters(self) -> int:
        """Parameters of one normalisation."""
        return self.width if self.norm == "rmsnorm" else 2 * self.width

    @property
    def feed_forward_parameters(self) -> int:
        """Parameters of one feed-forward sub-layer, which has no biases."""
        num_matrices = 3 if self.activation == "swiglu" else 2
        return num_matrices * self.width * self.resolved_feed_forward_width


def mean_attended_tokens(sequence_tokens: int, window_tokens: int | None) -> float:
    """Give the mean number of positions that a causal query sees, itself included.

    Args:
        sequence_tokens: Sequence length T.
        window_tokens: Most recent positions seen, or None for all.
    """
    window = min(window_tokens or sequence_tokens, sequence_tokens)
    return (window * (window + 1) / 2 + (sequence_tokens - window) * window) / sequence_tokens
