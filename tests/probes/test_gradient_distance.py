"""Gradients over distance against differences, sanity rows, and closed forms."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeline.config.lstm import LstmConfig
from pipeline.models.cells import build_cell
from pipeline.models.lstm import LstmAttentionLM
from pipeline.probes.embedded import logits_at_end
from pipeline.probes.gradient_distance import gradient_norms, growth_of_cell
from tests.probes.cases import ARMS, GPT, VANILLA, make_model, make_run, measure
from tests.training.cases import VOCAB_SIZE

EVERY_ARM = pytest.mark.parametrize("arm", ARMS)


def tokens(num_samples: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(VOCAB_SIZE, (num_samples, length), generator=generator)


@EVERY_ARM
def test_norms_equal_differences_of_the_loss(arm: str) -> None:
    model = make_model(ARMS[arm]).double()
    tokens_BT = tokens(1, 6)
    norms_BT = gradient_norms(model, tokens_BT)
    x_BTD = F.embedding(tokens_BT[:, :-1], model.embedding_VD).detach()

    @torch.no_grad()
    def loss(x_BTD: torch.Tensor) -> float:
        return float(F.cross_entropy(logits_at_end(model, x_BTD), tokens_BT[:, -1]))

    # The scan of minLSTM runs in float32 whatever its input.
    step, tolerance = (1e-3, 1e-2) if arm == "min_lstm" else (1e-5, 1e-4)
    for distance in (0, 4):
        slopes = []
        for column in range(x_BTD.shape[2]):
            shift = torch.zeros_like(x_BTD)
            shift[0, 4 - distance, column] = step
            slopes.append((loss(x_BTD + shift) - loss(x_BTD - shift)) / (2 * step))
        expected = math.sqrt(sum(slope**2 for slope in slopes))
        assert float(norms_BT[0, distance]) == pytest.approx(expected, rel=tolerance, abs=1e-9)


def elman(radius: float) -> LstmAttentionLM:
    """An Elman network whose recurrent matrix is a rotation times the radius, and small inputs."""
    model = make_model({**VANILLA, "cell": "elman", "init_std": 1e-3})
    assert isinstance(model, LstmAttentionLM)
    with torch.no_grad():
        model.get_parameter("layers.0.cell.weight_hh_l0").mul_(radius)
    return model.double()


@pytest.mark.parametrize(
    ("radius", "low", "high"), [(0.5, -0.70, -0.68), (1.0, -0.02, 0.02), (1.5, 0.03, 0.42)]
)
def test_an_elman_network_decays_holds_or_explodes_by_its_spectral_radius(
    radius: float, low: float, high: float
) -> None:
    model = elman(radius)
    logs_NT = gradient_norms(model, tokens(16, 41)).log()
    slope = float((logs_NT[:, 32] - logs_NT[:, 8]).mean()) / 24
    # 0.5 and 1 stay in the linear range, where a step multiplies by the radius; 1.5 leaves it, and
    # tanh takes part of the growth back.
    assert low <= slope <= high
    cell = model.layers[0].cell
    growth = growth_of_cell(cell, F.embedding(tokens(16, 41)[:, :-1], model.embedding_VD))
    assert low <= growth <= high


def test_a_forget_gate_of_one_half_halves_the_cell_at_each_step() -> None:
    config = LstmConfig.model_validate({**VANILLA, "forget_bias": 0.0})
    cell = build_cell(config, 16)
    cell.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        cell.get_parameter("weight_hh_l0").zero_()
        cell.get_parameter("weight_ih_l0").zero_()
    x_BTD = torch.zeros(2, 60, 16, dtype=torch.float64)
    growth = growth_of_cell(cell.double(), x_BTD)
    # The state's output part is gone after a step; the cell part halves, and with it the output.
    assert growth == pytest.approx(math.log(0.5), abs=0.02)


def test_no_gradient_arrives_from_beyond_the_window() -> None:
    fields = {"windowed": {**GPT, "depth": 1, "window_tokens": 3}}
    params = {"seeds": [0], "sequence_tokens": 8, "num_samples": 4, "num_groups": 2}
    runs = {"windowed": make_run(fields["windowed"])}
    rows = measure("gradient_distance", params, runs)
    assert [row["num_samples"] for row in rows] == [2, 2]
    for row in rows:
        norms = row["log_gradient_norm"]
        assert norms[0] == 0.0
        assert all(value is not None for value in norms[:3])
        assert norms[3:] == [None] * 5


def test_groups_are_means_of_logarithms_over_their_samples() -> None:
    params: dict[str, Any] = {"seeds": [2], "sequence_tokens": 6, "num_samples": 4}
    runs = {"lstm": make_run({**ARMS["lstm"], "vocab_size": VOCAB_SIZE})}
    whole, halves = (
        [
            row
            for row in measure("gradient_distance", {**params, "num_groups": groups}, runs)
            if row["kind"] == "gradient"
        ]
        for groups in (1, 2)
    )
    columns = {key: whole[0][key] for key in ("label", "state", "seed", "step")}
    assert columns == {"label": "lstm", "state": "initial", "seed": 2, "step": 0}
    means = [
        sum(pair) / 2 for pair in zip(*(row["log_gradient_norm"] for row in halves), strict=True)
    ]
    assert whole[0]["log_gradient_norm"] == pytest.approx(means)
