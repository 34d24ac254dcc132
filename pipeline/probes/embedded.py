"""A language model entered between embedding and head: from vectors to hidden states, to numbers.

Shapes: `B` batch, `T` time, `D` model, `C` channels, `V` vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.base import LanguageModel
from pipeline.models.documents import Borders


def hidden_states(model: LanguageModel, x_BTD: Tensor) -> Tensor:
    """Give the normalised states before the head, for vectors in place of embedded tokens.

    Each sample is one document, and nothing is dropped.
    """
    borders = Borders()
    states_BTD: Tensor = model.final_norm(
        model.backbone(model.add_positions(x_BTD, 0, borders), borders)
    )
    return states_BTD


def head_of(model: LanguageModel) -> Tensor:
    """Give the matrix `[V, D]` from states to logits."""
    return model.embedding_VD if model.is_tied else model.head_VD


class NumberReader(nn.Module):
    """A model that reads a few numbers at each position and gives one after the last.

    Embedding and head are linear layers of their own; the model's tables stay without gradient, so
    that AdamW leaves them alone.
    """

    def __init__(self, model: LanguageModel, channels: int, seed: int) -> None:
        super().__init__()
        width = model.embedding_VD.shape[1]
        self.model = model
        self.read = nn.Linear(channels, width)
        self.answer = nn.Linear(width, 1)
        generator = torch.Generator().manual_seed(seed)
        for linear, fan_in in ((self.read, channels), (self.answer, width)):
            nn.init.normal_(linear.weight, std=fan_in**-0.5, generator=generator)
            nn.init.zeros_(linear.bias)
        model.embedding_VD.requires_grad_(False)
        if not model.is_tied:
            model.head_VD.requires_grad_(False)

    def forward(self, numbers_BTC: Tensor) -> Tensor:
        """Give one number `[B]` for each sample."""
        states_BTD = hidden_states(self.model, self.read(numbers_BTC))
        answers_B: Tensor = self.answer(states_BTD[:, -1]).squeeze(1)
        return answers_B


def logits_at_end(model: LanguageModel, x_BTD: Tensor) -> Tensor:
    """Give the logits `[B, V]` after the last of some vectors."""
    return F.linear(hidden_states(model, x_BTD)[:, -1], head_of(model))
