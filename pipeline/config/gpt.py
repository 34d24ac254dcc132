"""The config of the GPT family and what follows from it by arithmetic.

Symbols: `d` width, `L` depth, `T` sequence tokens, `V` vocabulary, `f` feed-forward width.
"""

from typing import Literal, Self

from pydantic import model_validator

from pipeline.config.model_base import TRAINING_PASSES, ModelBase, ParameterCount


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
