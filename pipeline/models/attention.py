"""Multi-head self-attention: grouped, windowed, biased or normalised as the config says.

Shapes: `B` batch, `T` time of queries, `S` time of keys, `D` model, `H` heads, `G` heads of keys
and values, `K` head size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pipeline.config.chunks import MAX_PLAIN_KEYS
from pipeline.config.gpt import GptConfig
from pipeline.models.documents import Borders
from pipeline.models.layers import initialize_linear
from pipeline.models.positions import Rotation, alibi_bias, rotary_table, rotate

KeysValues = tuple[Tensor, Tensor]
"""Keys and values `[B, G, S, K]` of the tokens so far."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What all blocks share in one pass: who sees whom, and how queries and keys are turned."""

    mask: Tensor | None
    """bool, true where a query (row) sees a key (column), or what is added to the scores, -inf
    where it does not; `[T, S]`, with dimensions for samples or heads before them. None: a query
    sees all, up to itself if `is_causal`."""
    is_causal: bool
    """Whether, without a mask, queries see themselves and earlier keys only."""
    rotation: Rotation | None
    """Tables for the positions of the tokens, or None for no rotary positions."""


class SelfAttention(nn.Module):
    """Scaled dot-product attention of every token over those it sees.

    Source: Vaswani et al. 2017, section 3.2; Ainslie et al. 2023 (grouped heads); Dehghani et al.
    2023, section 2 (normalised queries and keys).
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        width, head_width = config.width, config.head_width
        self.head_counts = (config.heads, config.resolved_kv_heads, config.resolved_kv_heads)
        self.window_tokens = config.window_tokens
        self.init_std = config.init_std
        self.qkv = nn.Linear(width, sum(self.head_counts) * head_width, bias=config.biases)
        self.out = nn.Linear(width, width, bias=config.biases)
        self.query_norm: nn.RMSNorm | None = None
        self.key_norm: nn.RMSNorm | None = None
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(head_width, eps=config.norm_epsilon)
            self.key_norm = nn.RMSNorm(head_width, eps=config.norm_epsilon)

    def initialize(self, generator: Generator, residual_scale: float) -> None:
        """Draw the matrices; the one that writes to the residual stream is scaled down."""
        initialize_linear(self.qkv, self.init_std, generator)
        initialize_linear(self.out, self.init_std * residual_scale, generator)
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(self, x_BTD: Tensor, sight: Sight) -> Tensor:
        """Give the attended values.

        Args:
            x_BTD: Normalised input.
            sight: From `build_sight`.

        Returns:
            `[B, T, D]`, to be added to the residual stream.
        """
        return self._merge(attend(*self._project(x_BTD, sight.rotation), sight))

    def extend(self, x_BTD: Tensor, sight: Sight, past: KeysValues) -> tuple[Tensor, KeysValues]:
        """Give the attended values of tokens that follow the past, and what is kept for the next.

        Args:
            x_BTD: Normalised input.
            sight: From `build_sight`.
            past: Keys and values of the tokens before, at most a window of them.

        Returns:
            `[B, T, D]`, and keys and values of past and new tokens, at most a window of them.
        """
        q_BHTK, k_BGTK, v_BGTK = self._project(x_BTD, sight.rotation)
        k_BGSK = torch.cat((past[0], k_BGTK), dim=2)
        v_BGSK = torch.cat((past[1], v_BGTK), dim=2)
        y_BTD = self._merge(attend(q_BHTK, k_BGSK, v_BGSK, sight))
        if self.window_tokens is None:
            return y_BTD, (k_BGSK, v_BGSK)
        kept = slice(-self.window_tokens, None)
        return y_BTD, (k_BGSK[:, :, kept], v_BGSK[:, :, kept])

    def _project(self, x_BTD: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        all_BTNK = self.qkv(x_BTD).unflatten(2, (sum(self.head_counts), -1))
        q_BTHK, k_BTGK, v_BTGK = all_BTNK.split(self.head_counts, dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        elif rotation is not None:
            # As a view it would keep queries and keys from before the rotation until backward.
            v_BTGK = v_BTGK.contiguous()
        q_BHTK, k_BGTK = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2)
        if rotation is not None:
            q_BHTK, k_BGTK = rotate(q_BHTK, rotation), rotate(k_BGTK, rotation)
        return q_BHTK, k_BGTK, v_BTGK.transpose(1, 2)

    def _merge(self, y_BHTK: Tensor) -> Tensor:
        y_BTD: Tensor = self.out(y_BHTK.transpose(1, 2).flatten(2))
        return y_BTD


def build_sight(config: GptConfig, x_BTD: Tensor, num_past: int, borders: Borders) -> Sight:
    """Build what blocks share for the tokens of one pass.

    Args:
        config: Positions, window and direction.
        x_BTD: Embedded tokens.
        num_past: Tokens that came before them; of these, keys and values of the last window are
            kept, or of all.
        borders: The documents of the tokens, where there is no past.
    """
    num_tokens, device, window = x_BTD.shape[1], x_BTD.device, config.window_tokens
    num_kept = num_past if window is None else min(num_past, window)
    rotation = None
    if config.positions == "rope":
        positions = borders.positions()
        if positions is None:
            positions = torch.arange(num_past, num_past + num_tokens, device=device)
        rotation = rotary_table(positions, config.head_width, config.rope_base)
    together_B1TT = borders.together()
    hides_distant = window is not None and window < num_kept + num_tokens
    hides_some_past = config.causal and num_kept > 0 and num_tokens > 1
    has_bias = config.positions == "alibi"
    if together_B1TT is None and not (hides_distant or hides_some_past or has_bias):
        is_causal = config.causal and num_kept == 0
        return Sight(mask=None, is_causal=is_causal, rotation=rotation)
    times_S = torch.arange(num_kept + num_tokens, dtype=torch.int32, device=device)
    mask = seen_mask(times_S[num_kept:], times_S, window, is_causal=config.causal)
    if together_B1TT is not None:
        mask = mask & together_B1TT
    if has_bias:
        # Four dimensions: with three, the CPU falls back from its fused kernel.
        bias_1HTS = alibi_bias(times_S[num_kept:], times_S, config.heads).unsqueeze(0)
        mask = bias_1HTS.masked_fill(~mask, -math.inf).to(x_BTD.dtype)
    return Sight(mask=mask, is_causal=False, rotation=rotation)


def seen_mask(times_T: Tensor, times_S: Tensor, window: int | None, *, is_causal: bool) -> Tensor:
    """Give the bool mask `[T, S]` that is true where a query (row) sees a key (column).

    Args:
        times_T: Position of each query.
        times_S: Position of each key.
        window: Positions seen to one side, the own one included; None sees all.
        is_causal: Whether queries see themselves and earlier keys only.
    """
    times_T1 = times_T.unsqueeze(1)
    if window is None:
        window = len(times_S)
    latest_T1 = times_T1 if is_causal else times_T1 + (window - 1)
    return (times_S <= latest_T1) & (times_S > times_T1 - window)


def attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, sight: Sight) -> Tensor:
    """Give each query's mean `[B, H, T, K]` of the values it sees, by softmax weights.

    Each head of keys and values serves H / G query heads in a row.
    """
    is_cpu_bf16 = q_BHTK.device.type == "cpu" and q_BHTK.dtype == torch.bfloat16
    if is_cpu_bf16 and k_BGSK.shape[2] <= MAX_PLAIN_KEYS:
        return attend_plainly(q_BHTK, k_BGSK, v_BGSK, sight)
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        attn_mask=sight.mask,
        is_causal=sight.is_causal,
        enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
    )


def attend_plainly(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, sight: Sight) -> Tensor:
    """Do the same by two products and a softmax in float32, which the compiler fuses well.

    The query heads of a group are laid one after the other, so that its keys are never repeated.
    """
    num_samples, num_groups, num_keys, head_width = k_BGSK.shape
    scaled_BHTK = q_BHTK * (1 / math.sqrt(head_width))
    grouped_BGNK = scaled_BHTK.reshape(num_samples, num_groups, -1, head_width)
    scores_BGNS = grouped_BGNK @ k_BGSK.transpose(2, 3)
    scores_BHTS = scores_BGNS.view(*q_BHTK.shape[:3], num_keys).float()
    mask = sight.mask
    if sight.is_causal:
        times_S = torch.arange(num_keys, device=q_BHTK.device)
        mask = seen_mask(times_S, times_S, None, is_causal=True)
    if mask is not None and mask.dtype == torch.bool:
        scores_BHTS = scores_BHTS.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores_BHTS = scores_BHTS + mask
    weights_BHTS = scores_BHTS.softmax(dim=3).to(v_BGSK.dtype)
    return (weights_BHTS.view_as(scores_BGNS) @ v_BGSK).view_as(q_BHTK)
