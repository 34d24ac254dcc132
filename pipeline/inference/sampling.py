"""From the logits of the last position to the next token, by temperature, top-k and top-p.

Shapes: `V` vocabulary.
"""

from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Generator, Tensor


class SamplingConfig(BaseModel):
    """How the next token is drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(default=1.0, ge=0.0)
    """Divides the logits; 1 samples what the model learned, 0 takes the most likely token."""
    top_k: int | None = Field(default=None, ge=1)
    """Only this many most likely tokens can be drawn; None allows all."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Only the fewest most likely tokens that together have this probability can be drawn
    (Holtzman et al. 2020, section 3.1); None allows all."""

    @model_validator(mode="after")
    def _greedy_draws_nothing(self) -> Self:
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError(
                "temperature=0 takes the most likely token, so top_k and top_p would do nothing; "
                "leave them out or take a temperature above 0"
            )
        return self


def next_token(logits_V: Tensor, sampling: SamplingConfig, generator: Generator) -> int:
    """Draw one token.

    Args:
        logits_V: Unnormalised log-probabilities of the tokens that may come.
        sampling: How to draw.
        generator: Source of the draw, on the CPU; not used at temperature 0.

    Returns:
        A token id. Of equally likely ones temperature 0 takes the lowest.
    """
    if sampling.temperature == 0.0:
        return int(logits_V.argmax())
    weights_V = token_probabilities(logits_V, sampling)
    return int(torch.multinomial(weights_V.cpu(), 1, generator=generator))


def token_probabilities(logits_V: Tensor, sampling: SamplingConfig) -> Tensor:
    """Give the probabilities that tokens are drawn with, float32 `[V]`, at temperature above 0.

    First the temperature, then top-k, then top-p on what top-k left: the order of `transformers`.
    Tokens as likely as the last one that top-k or top-p keeps may be left out; the lower id stays.
    """
    # The largest becomes 0 before and in float64, so that no temperature divides it to inf or nan.
    below_V = logits_V.double() - logits_V.max()
    scaled_V = (below_V / sampling.temperature).float()
    ordered_V, order_V = scaled_V.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        ordered_V, order_V = ordered_V[: sampling.top_k], order_V[: sampling.top_k]
    kept_V = ordered_V.softmax(dim=0)
    if sampling.top_p is not None:
        # What stands before a token must not have reached the limit; so one token always stays.
        before_V = kept_V.cumsum(dim=0) - kept_V
        kept_V = torch.where(before_V < sampling.top_p, kept_V, 0.0)
    return torch.zeros_like(scaled_V).scatter(0, order_V, kept_V / kept_V.sum())
