"""Model configs and what follows from them by arithmetic: parameters and FLOPs.

Symbols: `d` width, `h` LSTM hidden width, `L` depth, `T` sequence tokens, `V` vocabulary,
`f` feed-forward width.
Every formula is tested against counting on the built model.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

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
    """Number of attention heads; divides the width."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Rows of the embedding table; None takes the tokenizer's size, a larger value pads it."""
    max_positions: int = Field(default=1024, ge=1)
    """Longest sequence, in tokens, that the model accepts."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before each sub-layer; rmsnorm has a gain only, layernorm a gain and a bias."""
    activation: Literal["gelu", "swiglu"] = "swiglu"
    """Feed-forward activation; swiglu has three matrices, gelu two."""
    feed_forward_width: int | None = Field(default=None, ge=1)
    """Hidden width f of the feed-forward sub-layer; None takes 4d for gelu and about 8d/3 for
    swiglu, so that both have close to 8 d^2 parameters (Shazeer 2020, section 2)."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
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
    def head_width(self) -> int:
        """Width K of one attention head."""
        return self.width // self.heads

    @property
    def resolved_feed_forward_width(self) -> int:
        """Hidden width f of the feed-forward sub-layer with the default filled in."""
        if self.feed_forward_width is not None:
            return self.feed_forward_width
        if self.activation == "gelu":
            return 4 * self.width
        return max(8, round(8 * self.width / 3 / 8) * 8)

    @property
    def norm_parameters(self) -> int:
        """Parameters of one normalisation."""
        return self.width if self.norm == "rmsnorm" else 2 * self.width

    @property
    def feed_forward_parameters(self) -> int:
        """Parameters of one feed-forward sub-layer, which has no biases."""
        num_matrices = 3 if self.activation == "swiglu" else 2
        return num_matrices * self.width * self.resolved_feed_forward_width


class GptConfig(ModelBase):
    """A decoder-only Transformer with pre-norm blocks and a head tied to the embedding."""

    family: Literal["gpt"] = "gpt"
    """Discriminates the model union."""
    positions: Literal["rope", "learned", "none"] = "rope"
    """Rotary (Su et al. 2021), a learned table of `max_positions` rows, or none."""

    @model_validator(mode="after")
    def _rope_needs_even_heads(self) -> Self:
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"positions=rope rotates pairs, but width/heads={self.head_width} is odd; "
                f"choose heads so that width/heads is even, or positions=learned"
            )
        return self

    def num_parameters(self, vocab_size: int) -> ParameterCount:
        """Count the parameters.

        Args:
            vocab_size: Rows V of the embedding table, padding included.
        """
        attention = 4 * self.width**2
        block = attention + self.feed_forward_parameters + 2 * self.norm_parameters
        non_embedding = self.depth * block + self.norm_parameters
        positions = self.max_positions * self.width if self.positions == "learned" else 0
        return ParameterCount(
            total=non_embedding + vocab_size * self.width + positions, non_embedding=non_embedding
        )

    def flops_per_token(self, vocab_size: int, sequence_tokens: int) -> float:
        """Give the training FLOPs of one token, averaged over a sequence; two FLOPs a multiply-add.

        Counts the matrix products of blocks, causal attention and head; norms and activations
        are left out.

        Args:
            vocab_size: Rows V of the embedding table.
            sequence_tokens: Sequence length T.

        Source: Kaplan et al. 2020, table 1, with the causal mean (T + 1) / 2 of attended positions.
        """
        matrices = self.depth * (4 * self.width**2 + self.feed_forward_parameters)
        attended = (sequence_tokens + 1) / 2
        attention = self.depth * 2 * self.width * attended
        head = vocab_size * self.width
        return TRAINING_PASSES * 2.0 * (matrices + attention + head)


class LstmConfig(ModelBase):
    """A decoder-only LSTM language model: residual pre-norm layers and one causal attention."""

    family: Literal["lstm_attention"] = "lstm_attention"
    """Discriminates the model union."""
    hidden_width: int | None = Field(default=None, ge=1)
    """Width h of the LSTM state; None takes `width`, another value adds a projection to d."""
    feed_forward: bool = True
    """Whether a feed-forward sub-layer follows each LSTM sub-layer."""
    attention: Literal["scaled_dot", "none"] = "scaled_dot"
    """Causal scaled-dot attention over the past hidden states, or none."""
    attention_after: Literal["last", "second_last"] = "last"
    """The layer whose output attention reads; SHA-RNN (Merity 2019) uses the second-last."""
    window_tokens: int | None = Field(default=None, ge=1)
    """Number of most recent positions, the own one included, that attention sees; None sees all."""
    forget_bias: float = 1.0
    """Initial forget-gate bias (Jozefowicz et al. 2015, section 2.2); 0 halves the state a step."""

    @model_validator(mode="after")
    def _second_last_needs_two(self) -> Self:
        if self.attention != "none" and self.attention_after == "second_last" and self.depth < 2:
            raise ValueError("attention_after=second_last needs depth >= 2; got depth=1")
        return self

    @property
    def resolved_hidden_width(self) -> int:
        """Width h of the LSTM state with the default filled in."""
        return self.hidden_width if self.hidden_width is not None else self.width

    @property
    def _lstm_matrices(self) -> int:
        hidden = self.resolved_hidden_width
        projection = 0 if hidden == self.width else hidden * self.width
        return 4 * hidden * (self.width + hidden) + projection

    def num_parameters(self, vocab_size: int) -> ParameterCount:
        """Count the parameters; an `nn.LSTM` layer has two bias vectors of 4h.

        Args:
            vocab_size: Rows V of the embedding table, padding included.
        """
        layer = self._lstm_matrices + 8 * self.resolved_hidden_width + self.norm_parameters
        if self.feed_forward:
            layer += self.feed_forward_parameters + self.norm_parameters
        attention = 0 if self.attention == "none" else 4 * self.width**2 + self.norm_parameters
        non_embedding = self.depth * layer + attention + self.norm_parameters
        return ParameterCount(
            total=non_embedding + vocab_size * self.width, non_embedding=non_embedding
        )

    def flops_per_token(self, vocab_size: int, sequence_tokens: int) -> float:
        """Give the training FLOPs of one token, averaged over a sequence; two FLOPs a multiply-add.

        Every recurrent matrix is used once a token, so there is no term in T outside attention.

        Args:
            vocab_size: Rows V of the embedding table.
            sequence_tokens: Sequence length T.

        Source: Kaplan et al. 2020, section 2.1, applied to the gates; a window of w caps attended
        positions.
        """
        matrices = self.depth * self._lstm_matrices
        if self.feed_forward:
            matrices += self.depth * self.feed_forward_parameters
        attention = 0.0
        if self.attention != "none":
            attended = mean_attended_tokens(sequence_tokens, self.window_tokens)
            attention = 4 * self.width**2 + 2 * self.width * attended
        head = vocab_size * self.width
        return TRAINING_PASSES * 2.0 * (matrices + attention + head)


def mean_attended_tokens(sequence_tokens: int, window_tokens: int | None) -> float:
    """Give the mean number of positions that a causal query sees, itself included.

    Args:
        sequence_tokens: Sequence length T.
        window_tokens: Most recent positions seen, or None for all.
    """
    window = min(window_tokens or sequence_tokens, sequence_tokens)
    return (window * (window + 1) / 2 + (sequence_tokens - window) * window) / sequence_tokens


ModelConfig = Annotated[GptConfig | LstmConfig, Field(discriminator="family")]
"""Any registered model config; `family` tells which."""
