"""From positions to what attention knows of them: rotations of pairs, or penalties on scores.

Shapes: `B` batch, `T` time of queries, `S` time of keys, `H` heads, `K` head size, `R` half of it.
"""

import math

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosines and signed sines for each value of a head, from `rotary_table`."""


def rotary_table(positions: Tensor, head_width: int, base: float) -> Rotation:
    """Give the tables that rotate pair r at position t by the angle t * base^(-r / R).

    Made anew in each forward pass, never kept as a buffer: a model cast to bf16 takes its buffers
    along, and 8 bits cannot tell position 257 from 258.

    Args:
        positions: Integers `[T]`, or `[B, T]` where samples have positions of their own.
        head_width: Head size K, even; R = K / 2.
        base: Ratio of the fastest to the slowest rotation.

    Returns:
        Cosines and sines in float32, `[T, K]` or `[B, 1, T, K]`, the sines of the first half
        negative.

    Source: Su et al. 2021, equation 15.
    """
    half = head_width // 2
    speeds_R = base ** (-torch.arange(half, dtype=torch.float32, device=positions.device) / half)
    angles = positions.float().unsqueeze(-1) * speeds_R
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return tables if positions.dim() == 1 else (tables[0].unsqueeze(1), tables[1].unsqueeze(1))


def rotate(x_BHTK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs (x[r], x[r + R]) in float32 and give the input's type back."""
    cos_TK, sin_TK = rotation
    wide_BHTK = x_BHTK.float()
    swapped_BHTK = wide_BHTK.roll(x_BHTK.shape[3] // 2, dims=3)
    return torch.addcmul(wide_BHTK * cos_TK, swapped_BHTK, sin_TK).to(x_BHTK.dtype)


def alibi_slopes(heads: int) -> list[float]:
    """Give the penalty of each head on a score, per token of distance.

    For a power of two they are 2^(-8/H), 2^(-16/H), ..., 2^-8. Other counts take those of the next
    lower power of two, then every other one of twice that power.

    Source: Press et al. 2022, section 3; the other counts from their released code.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * index / power) for index in range(1, power + 1)]
    between = [2.0 ** (-4.0 * index / power) for index in range(1, 2 * power + 1, 2)]
    return slopes + between[: heads - power]


def alibi_bias(times_T: Tensor, times_S: Tensor, heads: int) -> Tensor:
    """Give what ALiBi adds to the scores, float32 `[H, T, S]`.

    Distances are those in the sample: starting anew in each document would change none within it.

    Args:
        times_T: Position of each query.
        times_S: Position of each key.
        heads: Number of heads H.
    """
    slopes_H = torch.tensor(alibi_slopes(heads), device=times_T.device)
    return -slopes_H[:, None, None] * (times_T.unsqueeze(1) - times_S).abs()
