"""Recurrent layers and one causal attention over their states, as a language model.

Shapes: `B` batch, `T` time, `S` time of keys, `D` model, `C` recurrent state.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pipeline.config.lstm import LstmConfig
from pipeline.models.base import LanguageModel
from pipeline.models.cache import Cache
from pipeline.models.cells import State, build_cell
from pipeline.models.documents import Borders, Segments, positions_in
from pipeline.models.layers import FeedForward, build_norm, residual_scale
from pipeline.models.recall import Past, build_recall


class RecurrentLayer(nn.Module):
    """A recurrence, then a feed-forward, each on the normalised stream and added back to it.

    Without a residual stream (`backbone: vanilla`) it is the recurrence alone.
    """

    def __init__(self, config: LstmConfig, input_width: int) -> None:
        super().__init__()
        hidden = config.resolved_hidden_width
        self.is_residual = config.backbone == "residual"
        self.dropout = config.dropout
        self.init_std = config.init_std
        if self.is_residual:
            self.cell_norm = build_norm(config)
        self.cell = build_cell(config, input_width)
        self.projection: nn.Linear | None = None
        if hidden != config.width:
            self.projection = nn.Linear(hidden, config.width, bias=False)
        self.feed_forward: FeedForward | None = None
        if config.feed_forward:
            self.feed_forward_norm = build_norm(config)
            self.feed_forward = FeedForward(config)

    def initialize(self, generator: Generator, scale: float) -> None:
        """Draw the layer's parameters; what writes to the residual stream is scaled down."""
        if self.is_residual:
            self.cell_norm.reset_parameters()
        self.cell.initialize(generator)
        if self.projection is not None and self.is_residual:
            std = self.init_std * scale
            nn.init.normal_(self.projection.weight, std=std, generator=generator)
        elif self.projection is not None:
            nn.init.xavier_uniform_(self.projection.weight, generator=generator)
        if self.feed_forward is not None:
            self.feed_forward_norm.reset_parameters()
            self.feed_forward.initialize(generator, scale)

    def forward(
        self,
        x_BTD: Tensor,
        segments: Segments | None = None,
        state: State | None = None,
        fed_BTD: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Give the stream after the layer, and the state after the last token.

        Args:
            x_BTD: Stream before the layer.
            segments: Documents that start at zero; None: each sample is one.
            state: Where the samples start; None starts at zero.
            fed_BTD: What the recurrence reads beside the stream, with input feeding.
        """
        read_BTD = self.cell_norm(x_BTD) if self.is_residual else x_BTD
        if fed_BTD is not None:
            read_BTD = torch.cat((read_BTD, fed_BTD), dim=2)
        y_BTD, state = self.cell(read_BTD, segments, state)
        if self.projection is not None:
            y_BTD = self.projection(y_BTD)
        y_BTD = self._drop(y_BTD)
        x_BTD = x_BTD + y_BTD if self.is_residual else y_BTD
        if self.feed_forward is not None:
            x_BTD = x_BTD + self._drop(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return x_BTD, cast(State, state)

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the model knows of the tokens so far."""

    states: Sequence[State | None]
    """State of each layer; None is zero."""
    past: Past = ()
    """What attention keeps of them."""
    fed_B1D: Tensor | None = None
    """What attention recalled at the last one; only with input feeding."""


class LstmAttentionLM(LanguageModel):
    """A decoder-only recurrent model whose late layers attend over all states so far.

    Source: Merity 2019 (one attention sub-layer in a residual LSTM stack), Beck et al. 2024,
    section 4 (residual pre-norm backbone), Bahdanau et al. 2015 (attention over hidden states),
    Luong et al. 2015, section 3.3 (input feeding), Gal and Ghahramani 2016 (variational dropout).
    """

    def __init__(self, config: LstmConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.config = config
        fed_width = config.width if config.input_feeding else 0
        self.layers = nn.ModuleList(
            RecurrentLayer(config, config.width + (0 if index else fed_width))
            for index in range(config.depth)
        )
        self.attention = build_recall(config)
        if config.backbone == "vanilla":
            self.final_norm = nn.Identity()
        elif self.attention is not None:
            self.attention_norm = build_norm(config)

    def initialize(self, generator: Generator) -> None:
        """Draw every parameter from `generator`."""
        super().initialize(generator)
        scale = residual_scale(self.config.depth)
        for layer in self._recurrent_layers():
            layer.initialize(generator, scale)
        if self.attention is not None:
            if self.config.backbone == "residual":
                self.attention_norm.reset_parameters()
            self.attention.initialize(generator, scale)

    def checkpointable_blocks(self) -> list[nn.Module]:
        """Give the layers."""
        return list(self.layers)

    def compilable_blocks(self) -> list[nn.Module]:
        """Give the feed-forward sub-layers, which are all that is large beside the recurrence."""
        found = (layer.feed_forward for layer in self._recurrent_layers())
        return [feed_forward for feed_forward in found if feed_forward is not None]

    def backbone(self, x_BTD: Tensor, borders: Borders) -> Tensor:
        """Give the stream after the last layer, attention added after the configured one."""
        if self.config.input_dropout > 0.0:
            kept_B1D = F.dropout(
                torch.ones_like(x_BTD[:, :1]), self.config.input_dropout, self.training
            )
            x_BTD = x_BTD * kept_B1D
        if self.config.input_feeding:
            return self._feed(x_BTD, borders)
        seen_B1TT = None if self.attention is None else borders.seen(self.config.window_tokens)
        start = Memory(states=[None] * self.config.depth)
        return self._advance(x_BTD, start, borders.segments(), seen_B1TT)[0]

    def start_layers(self, batch_size: int) -> list[tuple[Tensor, ...]]:
        """Give states of zero, an empty past, and with input feeding a vector of zero."""
        none_B1D = self.embedding_VD.new_zeros(batch_size, 1, self.config.width)
        states = [layer.cell.start(none_B1D) for layer in self._recurrent_layers()]
        return [*states, (), (none_B1D,) if self.config.input_feeding else ()]

    def extend_backbone(self, x_BTD: Tensor, cache: Cache) -> Tensor:
        """Give the stream of the next tokens and take them up in the cache."""
        *states, past, fed = cache.layers
        memory = Memory(states=states, past=past, fed_B1D=fed[0] if fed else None)
        pieces_BTD = torch.split(x_BTD, 1, dim=1) if self.config.input_feeding else (x_BTD,)
        found = []
        for piece_BTD in pieces_BTD:
            y_BTD, memory = self._advance(piece_BTD, memory)
            found.append(y_BTD)
        fed = () if memory.fed_B1D is None else (memory.fed_B1D,)
        cache.layers = [*cast("Sequence[State]", memory.states), memory.past, fed]
        return torch.cat(found, dim=1)

    def _recurrent_layers(self) -> Iterable[RecurrentLayer]:
        return cast("Iterable[RecurrentLayer]", self.layers)

    def _advance(
        self,
        x_BTD: Tensor,
        memory: Memory,
        segments: Segments | None = None,
        seen_B1TS: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """Run all layers over the next tokens; a single one with input feeding."""
        attended_layer = self.config.depth - (2 if self.config.attention_after != "last" else 1)
        states, past, fed_B1D = [], memory.past, None
        for index, (layer, before) in enumerate(zip(self.layers, memory.states, strict=True)):
            x_BTD, state = layer(x_BTD, segments, before, None if index else memory.fed_B1D)
            states.append(state)
            if self.attention is not None and index == attended_layer:
                x_BTD, recalled_BTD, past = self._attend(x_BTD, past, seen_B1TS)
                fed_B1D = recalled_BTD if self.config.input_feeding else None
        return x_BTD, Memory(states=states, past=past, fed_B1D=fed_B1D)

    def _attend(
        self, x_BTD: Tensor, past: Past, seen_B1TS: Tensor | None
    ) -> tuple[Tensor, Tensor, Past]:
        """Give the stream with what attention recalls, the recalled alone, and the past."""
        assert self.attention is not None
        is_residual = self.config.backbone == "residual"
        read_BTD = self.attention_norm(x_BTD) if is_residual else x_BTD
        recalled_BTD, past = self.attention(read_BTD, past, seen_B1TS)
        dropped_BTD = F.dropout(recalled_BTD, self.dropout, self.training)
        return (x_BTD + dropped_BTD if is_residual else dropped_BTD), recalled_BTD, past

    def _feed(self, x_BTD: Tensor, borders: Borders) -> Tensor:
        """Take one token after the other, each with what attention recalled at the one before.

        A chain of about 3 L T dependent products, and T pasts kept for backward. Nothing here can
        run over all of T at once: this is the price of the arm, not of its code.
        """
        num_samples, num_tokens, width = x_BTD.shape
        seen_B1TT, starts_BT = borders.seen(self.config.window_tokens), None
        if borders.documents_BT is not None and borders.switches.reset_state:
            starts_BT = positions_in(borders.documents_BT) == 0
        memory = Memory(
            states=[layer.cell.start(x_BTD) for layer in self._recurrent_layers()],
            fed_B1D=x_BTD.new_zeros(num_samples, 1, width),
        )
        found = []
        for time, x_B1D in enumerate(torch.split(x_BTD, 1, dim=1)):
            if starts_BT is not None:
                memory = _forget(memory, starts_BT[:, time])
            seen_B11S = None
            if seen_B1TT is not None:
                window = self.config.window_tokens or num_tokens
                seen_B11S = seen_B1TT[:, :, time : time + 1, max(0, time + 1 - window) : time + 1]
            y_B1D, memory = self._advance(x_B1D, memory, None, seen_B11S)
            found.append(y_B1D)
        return torch.cat(found, dim=1)


def _forget(memory: Memory, starts_B: Tensor) -> Memory:
    """Give the memory with zero states where a document starts; the past is masked elsewhere."""
    kept_B1 = (~starts_B).unsqueeze(1)
    states = [
        tuple(part_BC * kept_B1 for part_BC in state)
        for state in cast("list[State]", memory.states)
    ]
    fed_B1D = None if memory.fed_B1D is None else memory.fed_B1D * kept_B1.unsqueeze(2)
    return Memory(states=states, past=memory.past, fed_B1D=fed_B1D)
