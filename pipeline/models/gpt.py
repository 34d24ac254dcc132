"""GPT: a stack of pre-norm attention and feed-forward blocks over a tied embedding.

Shapes: `B` batch, `T` time, `D` model, `P` positions.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pipeline.config.gpt import GptConfig
from pipeline.models.attention import CausalAttention, rotary_table
from pipeline.models.base import LanguageModel
from pipeline.models.documents import Borders
from pipeline.models.layers import INIT_STD, FeedForward, build_norm, residual_scale


class GptBlock(nn.Module):
    """Attention, then feed-forward, each on the normalised stream and added back to it."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = CausalAttention(config.width, config.heads)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)

    def initialize(self, generator: Generator, scale: float) -> None:
        """Draw the block's parameters."""
        self.attention_norm.reset_parameters()
        self.attention.initialize(generator, scale)
        self.feed_forward_norm.reset_parameters()
        self.feed_forward.initialize(generator, scale)

    def forward(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None, seen_B1TT: Tensor | None
    ) -> Tensor:
        """Give the stream after the block."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, seen_B1TT)
        x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return x_BTD


class GptLM(LanguageModel):
    """A decoder-only Transformer.

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
            nn.init.normal_(self.positions_PD, std=INIT_STD, generator=generator)
        for block in cast("Iterable[GptBlock]", self.blocks):
            block.initialize(generator, residual_scale(self.config.depth))

    def backbone(self, x_BTD: Tensor, borders: Borders) -> Tensor:
        """Give the stream after the last block."""
        num_tokens, positions_BT = x_BTD.shape[1], borders.positions()
        rotation = None
        if self.config.positions == "rope":
            rotation = rotary_table(num_tokens, self.config.head_width, x_BTD.device)
            if positions_BT is not None:
                cos_TR, sin_TR = rotation
                rotation = cos_TR[positions_BT].unsqueeze(1), sin_TR[positions_BT].unsqueeze(1)
        if self.config.positions == "learned":
            x_BTD = x_BTD + (
                self.positions_PD[:num_tokens]
                if positions_BT is None
                else F.embedding(positions_BT, self.positions_PD)
            )
        seen_B1TT = borders.seen(window_tokens=None)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotation, seen_B1TT)
        return x_BTD
