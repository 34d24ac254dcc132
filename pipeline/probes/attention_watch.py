"""From a pass of any model to the weights that its attention gave, or to a pass with other ones.

All forms of attention end in one of two calls of torch: scaled dot-product attention, or, where a
network scores, the softmax of three dimensions. Both families are watched there, so a model needs
no second way to run that only a probe would use.

Shapes: `B` batch, `T` time of queries, `S` time of keys, `H` heads, `G` heads of keys, `K` head
size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Watch(TorchFunctionMode):
    """While entered, every attention is watched, and changed where it is asked for."""

    def __init__(
        self,
        *,
        take: Callable[[int, Tensor], None] | None = None,
        zeroed_heads: Literal["all"] | Mapping[int, Sequence[int]] | None = None,
        is_swapped: bool = False,
    ) -> None:
        """Say what to do.

        Args:
            take: Called with the number of the call and the weights `[B, H, T, S]`.
            zeroed_heads: Heads whose result becomes 0, by the number of the call; or all.
            is_swapped: Whether each sample takes the weights of the one before it in the batch,
                the first those of the last: as sharp, as causal, and of another content.
        """
        super().__init__()
        self.num_calls = 0
        self._take, self._zeroed, self._is_swapped = take, zeroed_heads, is_swapped

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Step in at the two calls, and let all others pass."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(func, args, dict(kwargs))
        if func is Tensor.softmax and args[0].dim() == 3:
            return self._softmax(func, args, kwargs)
        return func(*args, **kwargs)

    def _attend(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        if self._take is not None:
            self._take(number, attention_weights(args[0], args[1], **kwargs))
        query, key, value = args
        if self._is_swapped:
            query, key = query.roll(1, dims=0), key.roll(1, dims=0)
            mask = kwargs.get("attn_mask")
            if mask is not None and mask.dim() == 4 and len(mask) > 1:
                kwargs["attn_mask"] = mask.roll(1, dims=0)
        y_BHTK = func(query, key, value, **kwargs)
        if self._zeroed is None:
            return y_BHTK
        kept_H = self._kept(number, y_BHTK.shape[1])
        return y_BHTK * kept_H.view(1, -1, 1, 1).to(y_BHTK)

    def _softmax(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        scores_BTS = args[0]
        if self._is_swapped:
            scores_BTS = scores_BTS.roll(1, dims=0)
        weights_BTS = func(scores_BTS, *args[1:], **kwargs)
        if self._take is not None:
            self._take(number, weights_BTS.unsqueeze(1))
        return weights_BTS if self._zeroed is None else weights_BTS * self._kept(number, 1)[0]

    def _kept(self, number: int, num_heads: int) -> Tensor:
        if self._zeroed == "all":
            return torch.zeros(num_heads)
        assert self._zeroed is not None
        kept_H = torch.ones(num_heads)
        kept_H[list(self._zeroed.get(number, ()))] = 0.0
        return kept_H


def attention_weights(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Give the weights `[B, H, T, S]` that scaled dot-product attention keeps to itself.

    Args:
        q_BHTK: Queries.
        k_BGSK: Keys.
        attn_mask: bool, true where a query sees a key, or what is added to the scores.
        is_causal: Whether, without a mask, queries see themselves and earlier keys.
        enable_gqa: Whether each head of keys serves several of queries; the shapes tell.
    """
    k_BHSK = k_BGSK.repeat_interleave(q_BHTK.shape[1] // k_BGSK.shape[1], dim=1)
    scores_BHTS = q_BHTK @ k_BHSK.transpose(2, 3) / math.sqrt(q_BHTK.shape[3])
    if is_causal:
        attn_mask = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=q_BHTK.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores_BHTS = scores_BHTS.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores_BHTS = scores_BHTS + attn_mask
    return scores_BHTS.softmax(dim=3)
