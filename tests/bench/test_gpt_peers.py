"""The Transformer's benchmark: how it updates masters, and what it refuses."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.bench.gpt_peers import PAIRS, compare, master_step, nanogpt_model
from tests.bench.timing import Spread


def test_masters_move_by_adamw_and_the_model_follows_in_bf16() -> None:
    torch.manual_seed(0)
    model, exact = nn.Linear(8, 8), nn.Linear(8, 8)
    exact.load_state_dict(model.state_dict())
    x = torch.randn(4, 8).bfloat16()
    step = master_step(model, lambda: model(x).float().square().mean())
    exact.bfloat16()(x).float().square().mean().backward()
    masters = [parameter.detach().float().requires_grad_() for parameter in exact.parameters()]
    for master, parameter in zip(masters, exact.parameters(), strict=True):
        assert parameter.grad is not None
        master.grad = parameter.grad.float()
    nn.utils.clip_grad_norm_(masters, 0.25)
    torch.optim.AdamW(masters, lr=1e-4, fused=True).step()
    step()
    for parameter, master in zip(model.parameters(), masters, strict=True):
        assert torch.equal(parameter, master.bfloat16())
        assert parameter.grad is None


@pytest.mark.parametrize("precision", PAIRS)
def test_every_pair_compares_the_median_step_times(precision: str) -> None:
    names = {name for peer, ours, _ in PAIRS[precision] for name in (peer, ours)}
    spreads = {
        name: Spread(median=0.2 if name.startswith("ours") else 0.4, min=0.1, max=0.4)
        for name in names
    }
    for comparison in compare(spreads, precision):
        assert comparison.ratio == pytest.approx(2.0)
        assert comparison.is_met


def test_a_missing_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give a checkout of github.com/karpathy/nanoGPT"):
        nanogpt_model(tmp_path)
