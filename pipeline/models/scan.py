"""The recurrence h_t = a_t h_(t-1) + b_t for all t at once, in log2(T) passes.

Published minLSTM code takes logarithms and one running sum of them over all of T. That sum grows
with T and loses digits as it does, and no finite logarithm starts a document at exactly zero. The
doubling below multiplies factors of at most 1 instead: it loses no more than the loop does, and a
factor of 0 is a border that nothing crosses.

Shapes: `B` batch, `T` time, `C` state.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def linear_scan(keep_BTC: Tensor, value_BTC: Tensor, start_BC: Tensor | None = None) -> Tensor:
    """Give h_t = keep_t h_(t-1) + value_t for every t.

    Args:
        keep_BTC: Factors from 0 to 1.
        value_BTC: Summands.
        start_BC: State before the first step; None is zero.

    Returns:
        `[B, T, C]`. Backward saves the factors and the result.

    Source: Hillis and Steele 1986 (doubling), Blelloch 1990, section 1.4 (the pairs it combines).
    """
    if start_BC is not None:
        first_B1C = value_BTC[:, :1] + keep_BTC[:, :1] * start_BC.unsqueeze(1)
        value_BTC = torch.cat((first_B1C, value_BTC[:, 1:]), dim=1)
    state_BTC: Tensor = _Scan.apply(keep_BTC, value_BTC)  # type: ignore[no-untyped-call]
    return state_BTC


class _Scan(torch.autograd.Function):
    """The scan from zero; its gradient is the scan in the other direction."""

    @staticmethod
    def forward(ctx: FunctionCtx, keep_BTC: Tensor, value_BTC: Tensor) -> Tensor:
        state_BTC = _double(keep_BTC, value_BTC)
        ctx.save_for_backward(keep_BTC, state_BTC)
        return state_BTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_BTC: Tensor) -> tuple[Tensor, Tensor]:
        keep_BTC, state_BTC = ctx.saved_tensors
        # What step t passes back is kept by the factor of step t + 1; the last has none.
        later_BTC = torch.cat((keep_BTC[:, 1:], torch.zeros_like(keep_BTC[:, :1])), dim=1)
        value_slope_BTC = _double(later_BTC.flip(1), slope_BTC.flip(1)).flip(1)
        before_BTC = torch.cat((torch.zeros_like(state_BTC[:, :1]), state_BTC[:, :-1]), dim=1)
        return value_slope_BTC * before_BTC, value_slope_BTC


def _double(keep_BTC: Tensor, value_BTC: Tensor) -> Tensor:
    """Combine each step with what ends `reach` steps before it, and double the reach."""
    reach = 1
    while reach < value_BTC.shape[1]:
        combined_BTC = value_BTC[:, reach:] + keep_BTC[:, reach:] * value_BTC[:, :-reach]
        value_BTC = torch.cat((value_BTC[:, :reach], combined_BTC), dim=1)
        factors_BTC = keep_BTC[:, reach:] * keep_BTC[:, :-reach]
        keep_BTC = torch.cat((keep_BTC[:, :reach], factors_BTC), dim=1)
        reach *= 2
    return value_BTC
