"""The scan against a plain loop, in values, gradients and at borders."""

import pytest
import torch
from torch import Tensor

from pipeline.models.scan import linear_scan


def draw(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (2, num_tokens, 3)
    keep_BTC = torch.rand(shape, generator=generator, dtype=torch.float64)
    value_BTC = torch.randn(shape, generator=generator, dtype=torch.float64)
    start_BC = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    return keep_BTC.requires_grad_(), value_BTC.requires_grad_(), start_BC.requires_grad_()


def loop(keep_BTC: Tensor, value_BTC: Tensor, start_BC: Tensor) -> Tensor:
    states = [start_BC]
    for keep_BC, value_BC in zip(keep_BTC.unbind(1), value_BTC.unbind(1), strict=True):
        states.append(keep_BC * states[-1] + value_BC)
    return torch.stack(states[1:], dim=1)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 13])
def test_the_scan_equals_a_loop_in_values_and_gradients(num_tokens: int) -> None:
    tensors = draw(num_tokens)
    expected_BTC, actual_BTC = loop(*tensors), linear_scan(*tensors)
    torch.testing.assert_close(actual_BTC, expected_BTC)
    slope_BTC = torch.randn_like(expected_BTC)
    expected = torch.autograd.grad(expected_BTC, tensors, slope_BTC)
    torch.testing.assert_close(torch.autograd.grad(actual_BTC, tensors, slope_BTC), expected)


def test_nothing_crosses_a_factor_of_zero() -> None:
    keep_BTC, value_BTC, start_BC = draw(9)
    keep_BTC.detach()[:, 5] = 0.0
    linear_scan(keep_BTC, value_BTC, start_BC)[:, 5:].sum().backward()
    for slope in (value_BTC.grad, keep_BTC.grad):
        assert slope is not None
        assert slope[:, :5].abs().max() == 0.0
    assert start_BC.grad is not None
    assert start_BC.grad.abs().max() == 0.0
