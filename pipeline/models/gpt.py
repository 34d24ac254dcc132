"""GPT: a stack of pre-norm attention and feed-forward blocks over embedded tokens.

Shapes: `B` batch, `T` time, `D` model, `P` positions.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pipeline.config.gpt import GptConfig
from pipeline.errors import ConfigError
from pipeline.models.attention import KeysValues, SelfAttention, Sight, build_sight
from pipeline.models.base import LanguageModel
from pipeline.models.cache import Cache
from pipeline.models.documents import Borders
from pipeline.models.layers import FeedForward, build_norm, residual_scale


class GptBlock(nn.Module):
    """Attention, then feed-forward, each on the normalised stream and added back to it."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config, biases=config.biases)
        self.dropout = nn.Dropout(config.dropout)

    def initialize(self, generator: Generator, scale: float) -> None:
        """Draw the block's parameters."""
        self.attention_norm.reset_parameters()
        self.attention.initialize(generator, scale)
        self.feed_forward_norm.reset_parameters()
        self.feed_forward.initialize(generator, scale)

    def forward(self, x_BTD: Tensor, sight: Sight) -> Tensor:
        """Give the stream after the block."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), sight))
        x_BTD = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return x_BTD

    def extend(self, x_BTD: Tensor, sight: Sight, past: KeysValues) -> tuple[Tensor, KeysValues]:
        """Give the stream of tokens that follow the past, and what is kept for the next."""
        y_BTD, kept = self.attention.extend(self.attention_norm(x_BTD), sight, past)
        x_BTD = x_BTD + self.dropout(y_BTD)
        x_BTD = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return x_BTD, kept


class GptLM(LanguageModel):
    """A decoder-only Transformer, or with `causal: false` one that sees both sides.

    Source: Radford et al. 2019 (pre-norm, initialisation), Su et al. 2021 (rotary positions),
    Touvron et al. 2023 (RMSNorm and SwiGLU, the defaults here).
    """

    def __init__(self, config: GptConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.config = config
        if config.positions == "learned":
            self.positions_PD = nn.Parameter(torch.empty(config.max_positions, config.width))
        self.blocks = nn.ModuleList(GptBlock(config) for _ in range(config.depth))

    def initialize(self, generator: Generator) -> None:
        """Draw every parameter from `generator`."""
        super().initialize(generator)
        if self.config.positions == "learned":
            nn.init.normal_(self.positions_PD, std=self.config.init_std, generator=generator)
        for block in self._blocks():
            block.initialize(generator, residual_scale(self.config.depth))

    def backbone(self, x_BTD: Tensor, borders: Borders) -> Tensor:
        """Give the stream after the last block."""
        sight = build_sight(self.config, x_BTD, 0, borders)
        for block in self.blocks:
            x_BTD = block(x_BTD, sight)
        return x_BTD

    def add_positions(self, x_BTD: Tensor, num_past: int, borders: Borders) -> Tensor:
        """Give embedded tokens plus the rows of learned positions, if the model has them."""
        if self.config.positions != "learned":
            return x_BTD
        positions_BT = borders.positions()
        if positions_BT is not None:
            return x_BTD + F.embedding(positions_BT, self.positions_PD)
        return x_BTD + self.positions_PD[num_past : num_past + x_BTD.shape[1]]

    def checkpointable_blocks(self) -> list[nn.Module]:
        """Give the blocks."""
        return list(self.blocks)

    def compilable_blocks(self) -> list[nn.Module]:
        """Give the blocks."""
        return list(self.blocks)

    def start_layers(self, batch_size: int) -> list[tuple[Tensor, ...]]:
        """Give keys and values `[B, G, 0, K]` for each block."""
        config = self.config
        shape = (batch_size, config.resolved_kv_heads, 0, config.head_width)
        empty_BGSK = self.embedding_VD.new_empty(shape)
        return [(empty_BGSK, empty_BGSK) for _ in range(config.depth)]

    def extend_backbone(self, x_BTD: Tensor, cache: Cache) -> Tensor:
        """Give the stream after the last block; every block keeps the tokens it may look back at.

        Raises:
            ConfigError: The model is not causal, so later tokens would change what is kept.
        """
        if not self.config.causal:
            raise ConfigError(
                "model.causal=false sees later tokens and cannot generate; train with true"
            )
        sight = build_sight(self.config, x_BTD, cache.num_tokens, Borders())
        for index, block in enumerate(self._blocks()):
            past = cast(KeysValues, cache.layers[index])
            x_BTD, cache.layers[index] = block.extend(x_BTD, sight, past)
        return x_BTD

    def _blocks(self) -> Iterable[GptBlock]:
        return cast("Iterable[GptBlock]", self.blocks)
