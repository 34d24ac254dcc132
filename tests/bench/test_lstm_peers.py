"""The LSTM benchmark: who goes first, what it takes off, and whose size it compares."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.bench.lstm_contenders import (
    OURS_BESIDE_BARE,
    OURS_BESIDE_EXAMPLE,
    Shape,
    build_part,
    load_example,
    part_step,
)
from tests.bench.lstm_peers import CLOCKS, PARTS, Comparison, measure
from tests.bench.timing import Spread


def test_each_round_begins_with_the_next_contender() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in ("a", "b", "c")}
    spreads = measure(steps, 1, CLOCKS["wall"])
    assert "".join(calls) == "abcbcacab"
    assert set(spreads) == set(steps)


TINY = Shape(vocab_size=16, num_samples=1, num_tokens=4)


@pytest.mark.parametrize("kind", PARTS)
def test_each_step_of_a_part_updates_all_that_it_has(kind: str) -> None:
    parts = build_part(kind, TINY)
    step = part_step(parts, TINY)
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in parts.parameters()]
        step()
        for old, parameter in zip(before, parts.parameters(), strict=True):
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0.0
            assert not torch.equal(old, parameter)


def test_the_parts_are_all_that_ours_has_beside_bare_layers() -> None:
    counts = [p.numel() for kind in PARTS for p in build_part(kind, TINY).parameters()]
    bare = nn.LSTM(OURS_BESIDE_BARE.width, OURS_BESIDE_BARE.width, OURS_BESIDE_BARE.depth)
    layers = sum(parameter.numel() for parameter in bare.parameters())
    ours = OURS_BESIDE_BARE.num_parameters(TINY.vocab_size).non_embedding
    assert sum(counts) + layers == ours


@pytest.mark.parametrize(("ratio", "is_met"), [(0.89, False), (0.9, True)])
def test_a_verdict_holds_the_ratio_against_the_target(
    ratio: float, is_met: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {"ours": Spread(median=0.5, min=0.4, max=0.6)}
    comparison = Comparison(
        name="c", tokens_per_step=2048, seconds=seconds, ratio=ratio, target=0.9, bound=1.5
    )
    comparison.print_table()
    printed = capsys.readouterr().out
    assert comparison.is_met == is_met
    assert "500.0 (400.0-600.0)" in printed
    assert "4,096" in printed
    assert ("met: " in printed) == is_met
    assert "would reach 1.50" in printed


def test_a_missing_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="model.py is missing; give a checkout of github.com"):
        load_example(tmp_path)


def test_ours_has_the_size_of_the_example() -> None:
    # Two tables and a bias of the head, and 8 (d^2 + d) a layer of torch's.
    theirs = 2 * 33_278 * 200 + 33_278 + 2 * 8 * (200**2 + 200)
    ours = OURS_BESIDE_EXAMPLE.num_parameters(33_278).total
    assert ours == pytest.approx(theirs, rel=0.01)
