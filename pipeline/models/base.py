"""What every family shares: from token ids to logits or token losses around a backbone.

Shapes: `B` batch, `T` time, `D` model, `V` vocabulary.
"""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pipeline.config.model_base import ModelBase
from pipeline.errors import ConfigError
from pipeline.models.cache import Cache
from pipeline.models.documents import Borders, DocumentRule
from pipeline.models.layers import build_norm
from pipeline.models.loss import token_losses

INITIAL_LOGIT_STD = 0.2
"""Largest standard deviation of the logits at the start. The loss then starts about 0.2^2 / 2 nats
above ln V at every width; with a gain of 1 and matrices of 0.02 it is 0.02^2 D / 2, beyond 0.1 from
D = 500 up."""


class LanguageModel(nn.Module):
    """A causal language model whose head is its embedding table, or a matrix of its own.

    A family gives `backbone`, `initialize` and, for generation, `start_layers` and
    `extend_backbone`. It keeps no buffers, so that a model can be built without memory and cast to
    any type. What it draws for dropout comes from torch's global generator, which nothing else
    uses: training seeds it for each rank, and checkpoints keep its state.
    """

    documents: DocumentRule | None = None
    """Where documents end and what stays within them; None: a sample is one document."""

    def __init__(self, config: ModelBase, vocab_size: int) -> None:
        super().__init__()
        self.max_positions = config.max_positions
        self.dropout = config.dropout
        self.z_loss = config.z_loss
        self.init_std = config.init_std
        # Parameters of this module itself: ZeRO-3 gathers them for the whole forward pass, so
        # embedding and head both find them whole. Inside a child they would be gone for the head.
        self.embedding_VD = nn.Parameter(torch.empty(vocab_size, config.width))
        if not config.tied_head:
            self.head_VD = nn.Parameter(torch.empty(vocab_size, config.width))
        self.is_tied = config.tied_head
        self.final_norm: nn.RMSNorm | nn.LayerNorm | nn.Identity = build_norm(config)

    def forward(self, inputs_BT: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Give logits, or with labels the loss of each token.

        Args:
            inputs_BT: Token ids, int64.
            labels_BT: Token ids to predict, int64, `IGNORED_LABEL` where there is none.

        Returns:
            Without labels the logits `[B, T, V]`; with labels float32 nats `[B, T]`, 0 where
            ignored. The gradient of the losses is that of the losses with z-loss, their value is
            without it.

        Raises:
            ConfigError: The input is longer than the model's positions.
        """
        self._check_positions(inputs_BT.shape[1])
        borders = Borders() if self.documents is None else self.documents.find(inputs_BT)
        x_BTD = self._embed(inputs_BT, 0, borders)
        x_BTD = self.final_norm(self.backbone(x_BTD, borders))
        if labels_BT is None:
            return F.linear(x_BTD, self._head())
        return token_losses(x_BTD, self._head(), labels_BT, self.z_loss)

    def logits(self, inputs_BT: Tensor) -> Tensor:
        """Give the logits `[B, T, V]` of token ids, through `__call__` so that hooks run."""
        logits_BTV: Tensor = self(inputs_BT)
        return logits_BTV

    def start(self, batch_size: int) -> Cache:
        """Give the cache of `batch_size` texts without a token yet, for `extend`."""
        return Cache(num_tokens=0, layers=self.start_layers(batch_size))

    def extend(self, inputs_BT: Tensor, cache: Cache) -> Tensor:
        """Read the next tokens of each text and give the logits after each of them.

        A prompt and a single token are the same call, and cutting a text otherwise changes
        nothing but rounding. Each text is one document, whatever `documents` says.

        Args:
            inputs_BT: Token ids that follow those in the cache, int64, T >= 1.
            cache: From `start` with B texts; grows in place by T tokens.

        Returns:
            The logits `[B, T, V]`.

        Raises:
            ConfigError: The text would be longer than the model's positions; the cache is
                unchanged.
        """
        num_tokens = cache.num_tokens + inputs_BT.shape[1]
        self._check_positions(num_tokens)
        x_BTD = self._embed(inputs_BT, cache.num_tokens, Borders())
        x_BTD = self.final_norm(self.extend_backbone(x_BTD, cache))
        cache.num_tokens = num_tokens
        return F.linear(x_BTD, self._head())

    def backbone(self, x_BTD: Tensor, borders: Borders) -> Tensor:
        """Give the last hidden states of embedded tokens, causal in T.

        Args:
            x_BTD: Embedded tokens, from `add_positions` and dropout.
            borders: What may not pass from one document to the next.
        """
        raise NotImplementedError

    def add_positions(self, x_BTD: Tensor, num_past: int, borders: Borders) -> Tensor:
        """Give embedded tokens with what the embedding tells of their positions, by default none.

        Args:
            x_BTD: Rows of the embedding table.
            num_past: Tokens that came before them.
            borders: Documents that may count their positions from 0.
        """
        return x_BTD

    def checkpointable_blocks(self) -> list[nn.Module]:
        """Give the modules whose activations can be computed again, one at a time, from inputs."""
        return []

    def compilable_blocks(self) -> list[nn.Module]:
        """Give the modules that `torch.compile` takes whole; a recurrence is in none of them."""
        return []

    def start_layers(self, batch_size: int) -> list[tuple[Tensor, ...]]:
        """Give what each layer knows before the first token, on the model's device, in its type."""
        raise NotImplementedError

    def extend_backbone(self, x_BTD: Tensor, cache: Cache) -> Tensor:
        """Give the last hidden states of tokens that follow those in the cache.

        Args:
            x_BTD: Embedded tokens; the first is at position `cache.num_tokens`.
            cache: Its `layers` take up the tokens; `num_tokens` is raised by the caller.
        """
        raise NotImplementedError

    def initialize(self, generator: Generator) -> None:
        """Draw every parameter from `generator`, in a fixed order; families add their own."""
        nn.init.normal_(self.embedding_VD, std=self.init_std, generator=generator)
        if not self.is_tied:
            nn.init.normal_(self.head_VD, std=self.init_std, generator=generator)
        if isinstance(self.final_norm, nn.Identity):
            return
        self.final_norm.reset_parameters()
        width = self.embedding_VD.shape[1]
        gain = min(1.0, INITIAL_LOGIT_STD / (self.init_std * math.sqrt(width)))
        nn.init.constant_(self.final_norm.weight, gain)

    def _embed(self, inputs_BT: Tensor, num_past: int, borders: Borders) -> Tensor:
        x_BTD = F.embedding(inputs_BT, self.embedding_VD)
        x_BTD = self.add_positions(x_BTD, num_past, borders)
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout > 0.0 else x_BTD

    def _head(self) -> Tensor:
        return self.embedding_VD if self.is_tied else self.head_VD

    def _check_positions(self, num_tokens: int) -> None:
        if num_tokens > self.max_positions:
            raise ConfigError(
                f"input of {num_tokens} tokens is longer than "
                f"model.max_positions={self.max_positions}; cut it or raise the field"
            )
