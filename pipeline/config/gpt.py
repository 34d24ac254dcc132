"""The config of the GPT family and what follows from it by arithmetic.

Symbols: `d` width, `L` depth, `T` sequence tokens, `V` vocabulary, `f` feed-forward width.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.gpt_presets import PRESETS, PresetName
from pipeline.config.model_base import (
    TRAINING_PASSES,
    ModelBase,
    ParameterCount,
    mean_attended_tokens,
)


class GptConfig(ModelBase):
    """A decoder-only Transformer with pre-norm blocks, as GPT-2 or Llama by its options."""

    family: Literal["gpt"] = "gpt"
    """Discriminates the model union."""
    preset: PresetName | None = None
    """A known shape, whose fields replace the defaults; fields beside it replace the preset's."""
    positions: Literal["rope", "learned", "none", "alibi"] = "rope"
    """Rotary (Su et al. 2021), a learned table of `max_positions` rows, none, or a penalty on
    scores that grows with the distance (Press et al. 2022)."""
    rope_base: float = Field(default=10_000.0, gt=1.0)
    """Ratio of the fastest to the slowest rotation (Su et al. 2021, section 3.2.2); longer contexts
    take more, as Llama 3 with 500,000."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Heads of keys and values, each shared by heads / kv_heads query heads (Ainslie et al. 2023);
    divides the heads; None takes `heads`."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm of the head's width before they are rotated, so that
    scores cannot grow without bound (Dehghani et al. 2023, section 2)."""
    window_tokens: int | None = Field(default=None, ge=1)
    """Number of most recent positions, the own one included, that attention sees; None sees all."""
    biases: bool = False
    """Whether the matrices of attention and feed-forward have biases, as in GPT-2."""
    causal: bool = True
    """Whether a position sees earlier ones only; False sees both sides, for experiments with the
    model class: no run trains it, because it sees the token to predict, and it cannot generate."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, fields: Any) -> Any:
        name = fields.get("preset") if isinstance(fields, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return fields  # the field's own check says what is wrong
        return {**PRESETS[name], **fields}

    @model_validator(mode="after")
    def _kv_heads_divide_heads(self) -> Self:
        if self.heads % self.resolved_kv_heads:
            legal = [count for count in range(1, self.heads + 1) if self.heads % count == 0]
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}; "
                f"legal: {', '.join(map(str, legal))}, or null for {self.heads}"
            )
        return self

    @model_validator(mode="after")
    def _window_fits_positions(self) -> Self:
        if self.window_tokens is not None and self.window_tokens > self.max_positions:
            raise ValueError(
                f"window_tokens={self.window_tokens} is longer than "
                f"max_positions={self.max_positions}; "
                f"nearest: {self.max_positions}, or null to see all"
            )
        return self

    @model_validator(mode="after")
    def _rope_needs_even_heads(self) -> Self:
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"positions=rope rotates pairs, but width/heads={self.head_width} is odd; "
                f"choose heads so that width/heads is even, or another of positions"
            )
        return self

    @property
    def resolved_kv_heads(self) -> int:
        """Heads of keys and values with the default filled in."""
        return self.kv_heads if self.kv_heads is not None else self.heads

    @property
    def _attention_matrices(self) -> int:
        keys_values = 2 * self.resolved_kv_heads * self.head_width
        return self.width * (2 * self.width + keys_values)

    @property
    def _block_vectors(self) -> int:
        """Parameters of one block that are no matrices: norms and biases."""
        vectors = 2 * self.norm_parameters + (2 * self.head_width if self.qk_norm else 0)
        if self.biases:
            inner = self.resolved_feed_forward_width * (2 if self.activation == "swiglu" else 1)
            vectors += self._attention_matrices // self.width + inner + self.width
        return vectors

    def num_parameters(self, vocab_size: int) -> ParameterCount:
        """Count the parameters.

        Args:
            vocab_size: Rows V of the embedding table, padding included.
        """
        block = self._attention_matrices + self.feed_forward_parameters + self._block_vectors
        non_embedding = self.depth * block + self.norm_parameters
        tables = vocab_size * (1 if self.tied_head else 2)
        if self.positions == "learned":
            tables += self.max_positions
        return ParameterCount(
            total=non_embedding + tables * self.width, non_embedding=non_embedding
        )

    def flops_per_token(
        self,
        vocab_size: int,
        sequence_tokens: int,
        convention: Literal["causal", "palm"] = "causal",
    ) -> float:
        """Give the training FLOPs of one token, averaged over a sequence; two FLOPs a multiply-add.

        Counts the matrix products of blocks, attention and head; norms and activations are left
        out.

        Args:
            vocab_size: Rows V of the embedding table.
            sequence_tokens: Sequence length T.
            convention: Whether attention counts the positions that a query sees, or all T of the
                sequence, as published model FLOPs utilisation does; a window caps both, of w
                positions to one side and 2w - 1 to both.

        Source: Kaplan et al. 2020, table 1, with the causal mean (T + 1) / 2 of attended positions;
        Chowdhery et al. 2022, appendix B (palm).
        """
        matrices = self.depth * (self._attention_matrices + self.feed_forward_parameters)
        attended = mean_attended_tokens(sequence_tokens, self.window_tokens)
        if not self.causal:
            attended = 2 * attended - 1  # as many later positions as earlier ones
        if convention == "palm":
            window = self.window_tokens or sequence_tokens
            attended = min(window if self.causal else 2 * window - 1, sequence_tokens)
        attention = self.depth * 2 * self.width * attended
        head = vocab_size * self.width
        return TRAINING_PASSES * 2.0 * (matrices + attention + head)

    def dependent_products(self, sequence_tokens: int) -> int:
        """Count the matrix products of a forward pass that have to follow each other.

        Queries and keys, scores, values, output and the two of the feed-forward do so in each
        block, and the head comes last, whatever the length of the sequence.

        Args:
            sequence_tokens: Sequence length T.
        """
        return 6 * self.depth + 1

    def generation_state_bytes(self, context_tokens: int, bytes_per_value: int) -> int:
        """Give the bytes of keys and values that generation keeps of one text.

        Args:
            context_tokens: Tokens of the text so far.
            bytes_per_value: 4 for fp32, 2 for bf16.
        """
        kept = min(self.window_tokens or context_tokens, context_tokens)
        return 2 * self.depth * self.resolved_kv_heads * self.head_width * kept * bytes_per_value

    def activation_bytes(
        self,
        micro_batch_samples: int,
        sequence_tokens: int,
        vocab_size: int,
        bytes_per_value: int,
        activation_checkpointing: bool = False,
    ) -> float:
        """Give the bytes that the forward pass of a micro-batch keeps for the backward pass.

        Counted as a CPU keeps them, with attention's fused kernel, which keeps no scores; the plain
        products of bf16 on a CPU do. On CUDA an RMSNorm keeps d values a token less. With
        checkpointing each block keeps its input alone, and while one is run again, a block's own
        activations stand beside those.

        Args:
            micro_batch_samples: Samples B.
            sequence_tokens: Tokens T of each.
            vocab_size: Rows V of the embedding table.
            bytes_per_value: 4 for fp32, 2 for bf16.
            activation_checkpointing: Whether blocks are run again in backward.
        """
        num_tokens = micro_batch_samples * sequence_tokens
        per_token = self.width if self.dropout > 0.0 else 0
        shared = 0
        if activation_checkpointing:
            per_token += self.depth * self.width
        else:
            per_token += self.depth * self._block_activations
            shared = self._shared_activations(sequence_tokens)
        # The head keeps its input, which the norm gave, and both its gradients.
        per_token += self._norm_activations + self.width
        values = num_tokens * per_token + shared + vocab_size * self.width
        token_ids = 2 * num_tokens * 8
        return values * bytes_per_value + token_ids

    @property
    def _norm_activations(self) -> int:
        """Values a token that a norm keeps: input, normalised input and root, or mean and root."""
        return 3 * self.width + 1 if self.norm == "rmsnorm" else 2 * self.width + 2

    @property
    def _block_activations(self) -> int:
        """Values a token that one block keeps."""
        queries_keys = (self.heads + self.resolved_kv_heads) * self.head_width
        values = self.resolved_kv_heads * self.head_width
        attention = queries_keys + values + self.width + self.heads  # the last: sums of weights
        if self.qk_norm:
            attention += 2 * queries_keys + self.heads + self.resolved_kv_heads
        num_hidden = 4 if self.activation == "swiglu" else 2
        feed_forward = num_hidden * self.resolved_feed_forward_width
        dropped = 2 * self.width if self.dropout > 0.0 else 0
        return 2 * self._norm_activations + attention + feed_forward + dropped

    def _shared_activations(self, sequence_tokens: int) -> int:
        """Values that do not grow with the samples: tables of rotations, masks as numbers."""
        tables = 2 * sequence_tokens * self.head_width if self.positions == "rope" else 0
        if self.positions == "alibi":
            return self.heads * sequence_tokens**2
        is_masked = self.window_tokens is not None and self.window_tokens < sequence_tokens
        return tables + (self.depth * sequence_tokens**2 if is_masked else 0)
