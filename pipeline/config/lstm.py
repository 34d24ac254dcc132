"""The config of the LSTM-attention family and what follows from it by arithmetic.

Symbols: `d` width, `h` recurrent width, `g` gates of the cell, `L` depth, `T` sequence tokens, `V`
vocabulary, `f` feed-forward width.
"""

from typing import Literal

from pipeline.config.lstm_activations import PAST_VALUES, backbone_values
from pipeline.config.lstm_fields import NUM_GATES, NUM_STATES, LstmFields
from pipeline.config.model_base import TRAINING_PASSES, ParameterCount, mean_attended_tokens

ATTENTION_MATRICES = {"none": 0, "dot": 2, "additive": 4, "scaled_dot": 4}
"""Form of attention to its parameters in units of d^2."""
ATTENTION_CHAIN = {"none": 0, "dot": 3, "additive": 4, "scaled_dot": 4}
"""Form of attention to the products that follow each other in it: queries and keys (not for dot),
scores, context, and the matrix after it."""


class LstmConfig(LstmFields):
    """A decoder-only recurrent language model, and its arithmetic in closed form."""

    def num_parameters(self, vocab_size: int) -> ParameterCount:
        """Count the parameters; a cell with a recurrent matrix has two bias vectors, as in torch.

        Args:
            vocab_size: Rows V of the embedding table, padding included.
        """
        hidden, norm = self.resolved_hidden_width, self.norm_parameters
        biases = NUM_GATES[self.cell] * hidden * (1 if self.cell == "min_lstm" else 2)
        non_embedding = self._recurrent_matrices + self.depth * biases
        if self.backbone == "residual":
            num_norms = self.depth * (2 if self.feed_forward else 1) + 1
            non_embedding += (num_norms + (self.attention != "none")) * norm
        if self.feed_forward:
            non_embedding += self.depth * self.feed_forward_parameters
        non_embedding += ATTENTION_MATRICES[self.attention] * self.width**2
        non_embedding += self.width if self.attention == "additive" else 0
        tables = vocab_size * self.width * (1 if self.tied_head else 2)
        return ParameterCount(total=non_embedding + tables, non_embedding=non_embedding)

    @property
    def _recurrent_matrices(self) -> int:
        """Parameters of the matrices of all cells and projections."""
        hidden, gates = self.resolved_hidden_width, NUM_GATES[self.cell]
        recurrent = 0 if self.cell == "min_lstm" else hidden
        projection = 0 if hidden == self.width else hidden * self.width
        fed = gates * hidden * self.width if self.input_feeding else 0
        return self.depth * (gates * hidden * (self.width + recurrent) + projection) + fed

    def flops_per_token(
        self,
        vocab_size: int,
        sequence_tokens: int,
        convention: Literal["causal", "palm"] = "causal",
    ) -> float:
        """Give the training FLOPs of one token, averaged over a sequence; two FLOPs a multiply-add.

        Matrix products only, as in the other family: every matrix is used once a token, so there is
        no term in T outside attention. The sum and tanh of each pair in additive attention are left
        out, as gates, norms and activations are.

        Args:
            vocab_size: Rows V of the embedding table.
            sequence_tokens: Sequence length T.
            convention: Whether attention counts the positions that a query sees, or all T of the
                sequence, as published model FLOPs utilisation does; a window caps both.

        Source: Kaplan et al. 2020, section 2.1, applied to the gates; Chowdhery et al. 2022,
        appendix B (palm).
        """
        products = self._recurrent_matrices + vocab_size * self.width
        if self.feed_forward:
            products += self.depth * self.feed_forward_parameters
        attended = mean_attended_tokens(sequence_tokens, self.window_tokens)
        if convention == "palm":
            attended = min(self.window_tokens or sequence_tokens, sequence_tokens)
        attention = float(ATTENTION_MATRICES[self.attention] * self.width**2)
        if self.attention != "none":
            attention += 2 * self.width * attended
        return TRAINING_PASSES * 2.0 * (products + attention)

    def dependent_products(self, sequence_tokens: int) -> int:
        """Count the longest chain of dependent matrix products in a forward pass.

        This is what the model demands, whatever runs it: layer l may be at token t while layer
        l + 1 is at t - 1 (a wavefront, as cuDNN schedules it), so the chain is about L + T. A
        device that finishes a layer before it begins the next, as ours does, runs L T. With input
        feeding the next token begins where attention ended, and no schedule shortens it.

        Args:
            sequence_tokens: Sequence length T.

        Source: Appleyard et al. 2016, section 3.3 (wavefront); Luong et al. 2015, section 3.3.
        """
        layer = 1 + (self.resolved_hidden_width != self.width) + 2 * self.feed_forward
        attention, head = ATTENTION_CHAIN[self.attention], 1
        if self.input_feeding:
            above = 0 if self.attention_after == "last" else layer
            return sequence_tokens * (self.depth * layer - above + attention) + above + head
        recurrent = 0 if self.cell == "min_lstm" else sequence_tokens - 1
        return recurrent + self.depth * layer + attention + head

    def generation_state_bytes(self, context_tokens: int, bytes_per_value: int) -> int:
        """Give the bytes that generation keeps of one text; only attention's grow with its length.

        Args:
            context_tokens: Tokens of the text so far.
            bytes_per_value: 4 for fp32, 2 for bf16.
        """
        states = self.depth * NUM_STATES[self.cell] * self.resolved_hidden_width
        attended = min(self.window_tokens or context_tokens, context_tokens)
        past = PAST_VALUES[self.attention] * self.width * attended
        fed = self.width if self.input_feeding else 0
        return (states + past + fed) * bytes_per_value

    def activation_bytes(
        self,
        micro_batch_samples: int,
        sequence_tokens: int,
        vocab_size: int,
        bytes_per_value: int,
        activation_checkpointing: bool = False,
    ) -> float:
        """Give the bytes that the forward pass of a micro-batch keeps for backward, on a CPU.

        See `lstm_activations` for what is counted. With checkpointing each layer keeps its input
        and is run again in backward; attention and loss are not.

        Args:
            micro_batch_samples: Samples B.
            sequence_tokens: Tokens T of each.
            vocab_size: Rows V of the embedding table.
            bytes_per_value: 4 for fp32, 2 for bf16.
            activation_checkpointing: Whether layers are run again in backward.
        """
        num_tokens = micro_batch_samples * sequence_tokens
        values = backbone_values(
            self, micro_batch_samples, sequence_tokens, is_recomputed=activation_checkpointing
        )
        # The head keeps its input and both its gradients.
        values += 2 * num_tokens * self.width + vocab_size * self.width
        token_ids = 2 * num_tokens * 8
        return values * bytes_per_value + token_ids
