"""Causal multi-head self-attention, full or windowed, with or without rotary positions.

Shapes: `B` batch, `T` time, `D` model, `H` heads, `K` head size, `R` half a head.
"""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pipeline.models.layers import INIT_STD

ROTARY_BASE = 10_000.0
"""Ratio of the slowest to the fastest rotation. Source: Su et al. 2021, section 3.2.2."""


class CausalAttention(nn.Module):
    """Scaled dot-product attention of every position over itself and earlier ones."""

    def __init__(self, width: int, heads: int, window_tokens: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.window_tokens = window_tokens
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def initialize(self, generator: Generator, residual_scale: float) -> None:
        """Draw the matrices; the one that writes to the residual stream is scaled down."""
        nn.init.normal_(self.qkv.weight, std=INIT_STD, generator=generator)
        nn.init.normal_(self.out.weight, std=INIT_STD * residual_scale, generator=generator)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        seen_B1TT: Tensor | None = None,
    ) -> Tensor:
        """Give the attended values.

        Args:
            x_BTD: Normalised input.
            rotation: Cosines and sines from `rotary_table`, or None for no rotary positions.
            seen_B1TT: True where row (query) sees column (key), causal and within the window; None
                sees all of the window.

        Returns:
            `[B, T, D]`, to be added to the residual stream.
        """
        num_tokens = x_BTD.shape[1]
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTD.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part_BTD in self.qkv(x_BTD).chunk(3, dim=2)
        )
        if rotation is not None:
            q_BHTK, k_BHTK = rotate(q_BHTK, *rotation), rotate(k_BHTK, *rotation)
        if seen_B1TT is not None:
            y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=seen_B1TT)
        elif self.window_tokens is None or self.window_tokens >= num_tokens:
            y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        else:
            seen_TT = window_mask(num_tokens, self.window_tokens, x_BTD.device)
            y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=seen_TT)
        y_BTD: Tensor = self.out(y_BHTK.transpose(1, 2).flatten(2))
        return y_BTD


def window_mask(num_tokens: int, window_tokens: int, device: torch.device) -> Tensor:
    """Give the bool mask `[T, T]` that is true where row (query) sees column (key).

    Args:
        num_tokens: Sequence length T.
        window_tokens: Most recent positions seen, the own one included.
        device: Where the mask is made.
    """
    ones_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device)
    return ones_TT.tril().triu(1 - window_tokens)


def rotary_table(num_tokens: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give the cosines and sines that rotate pair r at position t by t * base^(-r / R).

    Made anew in each forward pass, never kept as a buffer: a model cast to bf16 takes its buffers
    along, and 8 bits cannot tell position 257 from 258.

    Args:
        num_tokens: Sequence length T.
        head_width: Head size K, even.
        device: Where the tables are made.

    Returns:
        Two float32 tensors `[T, R]` with R = K / 2.

    Source: Su et al. 2021, equation 15.
    """
    pairs_R = torch.arange(head_width // 2, dtype=torch.float32, device=device)
    speeds_R = ROTARY_BASE ** (-pairs_R / (head_width // 2))
    times_T = torch.arange(num_tokens, dtype=torch.float32, device=device)
    angles_TR = torch.outer(times_T, speeds_R)
    return angles_TR.cos(), angles_TR.sin()


def rotate(x_BHTK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the pairs (x[r], x[r + R]) in float32 and give the input's type back.

    The tables may be `[B, 1, T, R]`, where samples have positions of their own.
    """
    a_BHTR, b_BHTR = x_BHTK.float().chunk(2, dim=3)
    turned_BHTK = torch.cat(
        (a_BHTR * cos_TR - b_BHTR * sin_TR, b_BHTR * cos_TR + a_BHTR * sin_TR), dim=3
    )
    return turned_BHTK.to(x_BHTK.dtype)
