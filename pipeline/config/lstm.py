"""The config of the LSTM-attention family and what follows from it by arithmetic.

Symbols: `d` width, `h` LSTM hidden width, `L` depth, `T` sequence tokens, `V` vocabulary,
`f` feed-forward width.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.model_base import (
    TRAINING_PASSES,
    ModelBase,
    ParameterCount,
    mean_attended_tokens,
)


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
