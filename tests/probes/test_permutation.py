"""Exact results on the order of tokens, and a planted leak of the future."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.models.base import LanguageModel
from pipeline.models.documents import Borders
from pipeline.models.gpt import GptLM
from pipeline.probes.permutation import measure_order, sharpen
from tests.probes.cases import ARMS, GPT, make_model, make_run, measure

NOPE = {**GPT, "positions": "none"}
CASES: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    # Without positions and mask a Transformer of any depth is equivariant.
    "bidirectional": (
        {**NOPE, "causal": False},
        {"equivariance": True, "prefix_invariance": True, "leak": False},
    ),
    "bidirectional_rope": (
        {**GPT, "causal": False},
        {"equivariance": False, "prefix_invariance": False, "leak": False},
    ),
    # One causal layer sees a bag at the last position, two do not.
    "causal_one_layer": (
        {**NOPE, "depth": 1},
        {"equivariance": False, "prefix_invariance": True, "leak": True},
    ),
    "causal_two_layers": (
        NOPE,
        {"equivariance": False, "prefix_invariance": False, "leak": True},
    ),
    **{
        f"causal_one_layer_{positions}": (
            {**GPT, "depth": 1, "positions": positions},
            {"equivariance": False, "prefix_invariance": False, "leak": True},
        )
        for positions in ("rope", "learned", "alibi")
    },
    **{
        arm: (ARMS[arm], {"equivariance": False, "prefix_invariance": False, "leak": True})
        for arm in ARMS
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_model_knows_of_order_is_exact(case: str) -> None:
    fields, expected = CASES[case]
    # Named as a model: no run may train one that sees the token to predict.
    params = {"sequence_tokens": 12, "models": {case: fields}}
    rows = measure("permutation", params, {"gpt": make_run(GPT)})
    assert {row["test"]: row["is_zero"] for row in rows} == expected
    for row in rows:
        # Rounding of float64 or a real change, and nothing near the bound.
        assert row["largest_change"] < 1e-11 or row["largest_change"] > 1e-3


class LeakyLM(GptLM):
    """Adds to each position a ten-thousandth of what comes one later."""

    def backbone(self, x_BTD: Tensor, borders: Borders) -> Tensor:
        states_BTD = super().backbone(x_BTD, borders)
        later_BTD = torch.roll(states_BTD, -1, dims=1)
        return torch.cat((states_BTD[:, :-1] + 1e-4 * later_BTD[:, :-1], states_BTD[:, -1:]), dim=1)


def test_a_planted_leak_of_the_future_turns_the_test_red() -> None:
    honest = make_model(GPT)
    sharpen(honest, 0)
    assert leak_of(honest)["is_zero"]
    honest.__class__ = LeakyLM
    assert not leak_of(honest)["is_zero"]


def leak_of(model: LanguageModel) -> dict[str, Any]:
    (row,) = [row for row in measure_order(model, (2, 6)) if row["test"] == "leak"]
    return row
