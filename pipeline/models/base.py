"""What every family shares: from token ids to logits or token losses around a backbone.

Shapes: `B` batch, `T` time, `D` model, `V` vocabulary.
"""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pipeline.config.model_base import ModelBase
from pipeline.errors import ConfigError
from pipeline.models.documents import Borders, DocumentRule
from pipeline.models.layers import INIT_STD, build_norm
from pipeline.models.loss import token_losses

INITIAL_LOGIT_STD = 0.2
"""Largest standard deviation of the logits at the start. The loss then starts about 0.2^2 / 2 nats
above ln V at every width; with a gain of 1 it is 0.02^2 D / 2, beyond 0.1 from D = 500 up."""


class LanguageModel(nn.Module):
    """A causal language model whose head is its embedding table.

    A family gives `backbone` and `initialize`. It keeps no buffers, so that a model can be built
    without memory and cast to any type.
    """

    documents: DocumentRule | None = None
    """Where documents end and what stays within them; None: a sample is one document."""

    def __init__(self, config: ModelBase, vocab_size: int) -> None:
        super().__init__()
        self.max_positions = config.max_positions
        # A parameter of this module itself: ZeRO-3 gathers it for the whole forward pass, so
        # embedding and head both find it whole. Inside a child it would be gone for the head.
        self.embedding_VD = nn.Parameter(torch.empty(vocab_size, config.width))
        self.final_norm = build_norm(config)

    def forward(self, inputs_BT: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Give logits, or with labels the loss of each token.

        Args:
            inputs_BT: Token ids, int64.
            labels_BT: Token ids to predict, int64, `IGNORED_LABEL` where there is none.

        Returns:
            Without labels the logits `[B, T, V]`; with labels float32 nats `[B, T]`, 0 where
            ignored.

        Raises:
            ConfigError: The input is longer than the model's positions.
        """
        num_tokens = inputs_BT.shape[1]
        if num_tokens > self.max_positions:
            raise ConfigError(
                f"input of {num_tokens} tokens is longer than "
                f"model.max_positions={self.max_positions}; cut it or raise the field"
            )
        borders = Borders() if self.documents is None else self.documents.find(inputs_BT)
        x_BTD = self.backbone(F.embedding(inputs_BT, self.embedding_VD), borders)
        logits_BTV = F.linear(self.final_norm(x_BTD), self.embedding_VD)
        return logits_BTV if labels_BT is None else token_losses(logits_BTV, labels_BT)

    def logits(self, inputs_BT: Tensor) -> Tensor:
        """Give the logits `[B, T, V]` of token ids, through `__call__` so that hooks run."""
        logits_BTV: Tensor = self(inputs_BT)
        return logits_BTV

    def backbone(self, x_BTD: Tensor, borders: Borders) -> Tensor:
        """Give the last hidden states of embedded tokens, causal in T.

        Args:
            x_BTD: Embedded tokens.
            borders: What may not pass from one document to the next.
        """
        raise NotImplementedError

    def initialize(self, generator: Generator) -> None:
        """Draw every parameter from `generator`, in a fixed order; families add their own."""
        nn.init.normal_(self.embedding_VD, std=INIT_STD, generator=generator)
        self.final_norm.reset_parameters()
        width = self.embedding_VD.shape[1]
        gain = min(1.0, INITIAL_LOGIT_STD / (INIT_STD * math.sqrt(width)))
        nn.init.constant_(self.final_norm.weight, gain)
