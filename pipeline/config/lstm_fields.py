"""The fields of the LSTM-attention family, and which of their values contradict each other.

Symbols: `d` width, `h` recurrent width.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.model_base import ModelBase

NUM_GATES = {"lstm": 4, "gru": 3, "elman": 1, "min_lstm": 3}
"""Cell to the number g of vectors of width h that its input matrix gives."""

NUM_STATES = {"lstm": 2, "gru": 1, "elman": 1, "min_lstm": 1}
"""Cell to the number of vectors of width h that pass from one token to the next."""


class LstmFields(ModelBase):
    """What a decoder-only recurrent language model with at most one causal attention is."""

    family: Literal["lstm_attention"] = "lstm_attention"
    """Discriminates the model union."""
    backbone: Literal["residual", "vanilla"] = "residual"
    """Residual pre-norm layers (Beck et al. 2024, section 4: perplexity 35 where a plain stack of
    the same cells stays at 2418), or vanilla: the plain stack without norms, residuals and
    feed-forward. Vanilla is the straw man of many comparisons; label its results so, and give it an
    `init_std` near 0.1, without which the embedding is too small for layers without norms."""
    cell: Literal["lstm", "gru", "elman", "min_lstm"] = "lstm"
    """The recurrence. GRU (Cho et al. 2014) and Elman (1990) are controls of the cell; min_lstm
    (Feng et al. 2024) has no recurrent matrix and runs as a scan, a control of the recurrence."""
    hidden_width: int | None = Field(default=None, ge=1)
    """Width h of the recurrent state; None takes `width`, another value adds a projection to d."""
    feed_forward: bool = True
    """Whether a feed-forward sub-layer follows each recurrence."""
    attention: Literal["scaled_dot", "dot", "additive", "none"] = "scaled_dot"
    """Causal attention over the hidden states: with queries, keys, values and heads; of the states
    themselves (Luong et al. 2015); by a small network (Bahdanau et al. 2015); or none."""
    attention_after: Literal["last", "second_last"] = "last"
    """The layer whose output attention reads; SHA-RNN (Merity 2019) uses the second-last."""
    window_tokens: int | None = Field(default=None, ge=1)
    """Number of most recent positions, the own one included, that attention sees; None sees all."""
    input_feeding: bool = False
    """Whether the first layer reads what attention recalled one token before (Luong et al. 2015,
    section 3.3). Training then runs token by token, several times slower on any device."""
    carry_state: bool = False
    """Only false: the loader shuffles samples, so the next sample does not continue this one, and a
    state handed on would be that of an unrelated text. Reading on is `extend`, in generation."""
    forget_bias: float | Literal["chrono"] = 1.0
    """Bias of the forget gate at the start (Jozefowicz et al. 2015, section 2.2), of a GRU's update
    gate; 0 halves the state a step; chrono draws spans of 1 to `max_positions` tokens (Tallec and
    Ollivier 2018)."""
    input_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the features of the embedding that training zeroes, the same at all tokens of a
    sample (Gal and Ghahramani 2016); for data read many times: 0.4 in Merity et al. 2018."""
    weight_drop: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the recurrent connections that training cuts, the same at all tokens of a batch
    (Merity et al. 2018, section 2: 0.5); for data read many times."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for is_wrong, message in self._contradictions():
            if is_wrong:
                raise ValueError(message)
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        """Give each rule between fields: whether it is broken, and what to say."""
        vanilla, attends = self.backbone == "vanilla", self.attention != "none"
        window = self.window_tokens
        return [
            (
                attends and self.attention_after == "second_last" and self.depth < 2,
                "attention_after=second_last needs depth >= 2; got depth=1",
            ),
            (
                not attends and self.attention_after != "last",
                "attention_after=second_last places an attention that attention=none leaves out; "
                "legal: last, or attention=scaled_dot, dot or additive",
            ),
            (
                not attends and window is not None,
                f"window_tokens={window} limits an attention that attention=none leaves out; "
                "legal: null, or attention=scaled_dot, dot or additive",
            ),
            (
                window is not None and window > self.max_positions,
                f"window_tokens={window} is longer than max_positions={self.max_positions}; "
                f"nearest: {self.max_positions}, or null to see all",
            ),
            (
                vanilla and self.feed_forward,
                "feed_forward=true adds to a residual stream, which backbone=vanilla lacks; "
                "legal: false, or backbone=residual",
            ),
            (
                vanilla and self.attention == "scaled_dot",
                "attention=scaled_dot adds to a residual stream, which backbone=vanilla lacks; "
                "legal: none, dot, additive, or backbone=residual",
            ),
            *self._contradictions_of_the_cell(),
        ]

    def _contradictions_of_the_cell(self) -> list[tuple[bool, str]]:
        chrono = self.forget_bias == "chrono"
        return [
            (
                self.input_feeding and self.attention == "none",
                "input_feeding=true feeds what attention recalls, but attention=none; "
                "legal: false, or attention=scaled_dot, dot or additive",
            ),
            (
                self.input_feeding and self.cell == "min_lstm",
                "input_feeding=true runs token by token, but cell=min_lstm is the arm that does "
                "not; legal: false, or cell=lstm, gru or elman",
            ),
            (
                self.input_feeding and self.weight_drop > 0.0,
                f"weight_drop={self.weight_drop} cuts the same connections at all tokens, but "
                "input_feeding=true calls the cell once a token; legal: 0, or input_feeding=false",
            ),
            (
                self.weight_drop > 0.0 and self.cell == "min_lstm",
                f"weight_drop={self.weight_drop} cuts recurrent connections, of which "
                "cell=min_lstm has none; legal: 0, or cell=lstm, gru or elman",
            ),
            (
                self.cell == "elman" and self.forget_bias != 1.0,
                f"forget_bias={self.forget_bias} needs a forget gate, which cell=elman lacks; "
                "legal: the default 1.0, which it takes no notice of, or another cell",
            ),
            (
                chrono and self.max_positions < 3,
                f"forget_bias=chrono draws spans of 1 to max_positions - 1 tokens, but "
                f"max_positions={self.max_positions}; nearest: max_positions=3",
            ),
            (
                self.carry_state,
                "carry_state=true would start a sample from the state of an unrelated one, because "
                "samples are shuffled; legal: false",
            ),
        ]

    @property
    def has_heads(self) -> bool:
        """Whether attention is cut into heads."""
        return self.attention == "scaled_dot"

    @property
    def is_compilable(self) -> bool:
        """Whether any part of the model gets faster by `torch.compile`: recurrences never do."""
        return self.feed_forward

    @property
    def resolved_hidden_width(self) -> int:
        """Width h of the recurrent state with the default filled in."""
        return self.hidden_width if self.hidden_width is not None else self.width
