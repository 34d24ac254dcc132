"""LSTM with attention: residual pre-norm LSTM layers and one causal attention over their states.

Shapes: `B` batch, `T` time, `D` model, `C` LSTM state.
"""

from collections.abc import Iterable
from typing import cast

from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pipeline.config.lstm import LstmConfig
from pipeline.models.attention import CausalAttention
from pipeline.models.base import LanguageModel
from pipeline.models.documents import Borders, Segments
from pipeline.models.layers import INIT_STD, FeedForward, build_norm, residual_scale


class SegmentedLstm(nn.LSTM):
    """An LSTM whose state starts at zero in every sample, or in every segment of one.

    Packed sequences stay inside, so that modules exchange plain tensors only.
    """

    def forward(self, x_BTD: Tensor, segments: Segments | None = None) -> Tensor:  # type: ignore[override]
        """Give the states `[B, T, C]`."""
        state_BTC: Tensor
        if segments is None:
            state_BTC, _ = super().forward(x_BTD)
            return state_BTC
        x_PD = x_BTD.flatten(0, 1).index_select(0, segments.tokens_P)
        packed, _ = super().forward(PackedSequence(x_PD, segments.batch_sizes))
        state_NC: Tensor = packed.data.index_select(0, segments.places_N)
        return state_NC.view(*x_BTD.shape[:2], -1)


class RecurrentLayer(nn.Module):
    """An LSTM, then a feed-forward, each on the normalised stream and added back to it."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        hidden = config.resolved_hidden_width
        self.forget_bias = config.forget_bias
        self.lstm_norm = build_norm(config)
        self.lstm = SegmentedLstm(config.width, hidden, batch_first=True)
        self.projection: nn.Linear | None = None
        if hidden != config.width:
            self.projection = nn.Linear(hidden, config.width, bias=False)
        self.feed_forward: FeedForward | None = None
        if config.feed_forward:
            self.feed_forward_norm = build_norm(config)
            self.feed_forward = FeedForward(config)

    def initialize(self, generator: Generator, scale: float) -> None:
        """Draw the layer's parameters."""
        self.lstm_norm.reset_parameters()
        initialize_lstm(self.lstm, self.forget_bias, generator)
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=INIT_STD * scale, generator=generator)
        if self.feed_forward is not None:
            self.feed_forward_norm.reset_parameters()
            self.feed_forward.initialize(generator, scale)

    def forward(self, x_BTD: Tensor, segments: Segments | None) -> Tensor:
        """Give the stream after the layer; the state starts at zero in every sample or segment."""
        state_BTC = self.lstm(self.lstm_norm(x_BTD), segments)
        x_BTD = x_BTD + (state_BTC if self.projection is None else self.projection(state_BTC))
        if self.feed_forward is not None:
            x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return x_BTD


class LstmAttentionLM(LanguageModel):
    """A decoder-only LSTM whose late layers attend over all states so far.

    Order comes from the recurrence alone, so attention carries no positions.

    Source: Merity 2019 (one attention sub-layer in a residual LSTM stack), Beck et al. 2024,
    section 4 (residual pre-norm backbone), Bahdanau et al. 2015 (attention over hidden states).
    """

    def __init__(self, config: LstmConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.config = config
        self.layers = nn.ModuleList(RecurrentLayer(config) for _ in range(config.depth))
        self.attention: CausalAttention | None = None
        if config.attention != "none":
            self.attention_norm = build_norm(config)
            self.attention = CausalAttention(config.width, config.heads, config.window_tokens)

    def initialize(self, generator: Generator) -> None:
        """Draw every parameter from `generator`."""
        super().initialize(generator)
        scale = residual_scale(self.config.depth)
        for layer in cast("Iterable[RecurrentLayer]", self.layers):
            layer.initialize(generator, scale)
        if self.attention is not None:
            self.attention_norm.reset_parameters()
            self.attention.initialize(generator, scale)

    def backbone(self, x_BTD: Tensor, borders: Borders) -> Tensor:
        """Give the stream after the last layer, attention added after the configured one."""
        segments, seen_B1TT = borders.segments(), None
        if self.attention is not None:
            seen_B1TT = borders.seen(self.attention.window_tokens)
        attended_layer = self.config.depth - (2 if self.config.attention_after != "last" else 1)
        for index, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, segments)
            if self.attention is not None and index == attended_layer:
                x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), seen_B1TT=seen_B1TT)
        return x_BTD


def initialize_lstm(lstm: nn.LSTM, forget_bias: float, generator: Generator) -> None:
    """Draw the weights of a one-layer LSTM: gates in the order input, forget, cell, output.

    Args:
        lstm: The module to fill.
        forget_bias: Sum of the two forget biases that PyTorch adds up; all other biases are 0.
        generator: Source of the draws.

    Source: Glorot and Bengio 2010 (input weights), Saxe et al. 2014 (orthogonal recurrence),
    Jozefowicz et al. 2015, section 2.2 (forget bias).
    """
    input_gates = lstm.get_parameter("weight_ih_l0").chunk(4)
    recurrent_gates = lstm.get_parameter("weight_hh_l0").chunk(4)
    for input_CD, recurrent_CC in zip(input_gates, recurrent_gates, strict=True):
        nn.init.xavier_uniform_(input_CD, generator=generator)
        nn.init.orthogonal_(recurrent_CC, generator=generator)
    nn.init.zeros_(lstm.get_parameter("bias_hh_l0"))
    input_bias = lstm.get_parameter("bias_ih_l0")
    nn.init.zeros_(input_bias)
    nn.init.constant_(input_bias.chunk(4)[1], forget_bias)
