"""What fresh models make of permuted and of later tokens: exact tests in float64.

Three numbers say what a model knows of order, and one whether it sees what it is to predict:
equivariance is |f(P x) - P f(x)|, prefix invariance the change at the last position when the tokens
before it are permuted, and the leak the change at positions up to t when the token t + 1 is another
one. All are the largest absolute difference of a logit, over a scale of the logits themselves.

Shapes: `B` samples, `T` time, `V` vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.models import build_model
from pipeline.models.base import LanguageModel
from pipeline.probes.context import ProbeContext
from pipeline.probes.settings import PermutationParams, choose_runs

TOLERANCE = 1e-5
"""Largest relative change that counts as none; float64 leaves 1e-12, so what lies above is real."""
VOCAB_SIZE = 32
"""Random ids; the tokenizer of a run would make the test slower and not sharper."""
GAIN = 1.0
"""Matrices are drawn anew so that products keep the size of what they multiply: with entries of
0.02 attention is nearly flat, and order hardly tells."""


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Test every model, on rank 0.

    Args:
        runs: Label to run, of which the model alone counts.
        context: Rank group and arguments.

    Returns:
        For each model and seed the records `test` = `equivariance`, `prefix_invariance` and
        `leak`, with `largest_change`, `tolerance` and `is_zero`.

    Raises:
        ConfigError: An argument is illegal.
    """
    params = context.parse_params(PermutationParams)
    if context.ranks.rank > 0:
        return []
    records = []
    for label, config in choose_runs(params, runs).items():
        for seed in params.seeds:
            model = build_model(config.model, VOCAB_SIZE, seed)
            sharpen(model, seed)
            shape = (params.num_samples, params.sequence_tokens)
            columns = {"label": label, "state": "initial", "seed": seed}
            records += [{**columns, **row} for row in measure_order(model, shape)]
    return records


@torch.no_grad()
def sharpen(model: LanguageModel, seed: int) -> None:
    """Draw every matrix anew with a gain of `GAIN`, and cast to float64."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            std = GAIN / parameter.shape[1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    model.embedding_VD.mul_(model.embedding_VD.shape[1] ** 0.5)


def measure_order(model: LanguageModel, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Give the records of one model.

    Args:
        model: Set to evaluation; sharper where its weights are not near 0.
        shape: Samples B and tokens T.
    """
    tests: dict[str, Callable[[LanguageModel, Tensor, np.random.Generator], float]] = {
        "equivariance": equivariance_error,
        "prefix_invariance": prefix_change,
        "leak": future_leak,
    }
    rng = np.random.default_rng(0)
    inputs_BT = torch.from_numpy(rng.integers(0, VOCAB_SIZE, shape))
    rows = []
    for name, test in tests.items():
        change = test(model, inputs_BT, rng)
        rows.append(
            {
                "test": name, "largest_change": change, "tolerance": TOLERANCE,
                "is_zero": change <= TOLERANCE,
            }
        )  # fmt: skip
    return rows


@torch.no_grad()
def equivariance_error(model: LanguageModel, inputs_BT: Tensor, rng: np.random.Generator) -> float:
    """Give the largest relative difference between f(P x) and P f(x)."""
    order_T = _derangement(inputs_BT.shape[1], rng)
    logits_BTV = model.logits(inputs_BT)
    permuted_BTV = model.logits(inputs_BT[:, order_T])
    return _relative(permuted_BTV - logits_BTV[:, order_T], logits_BTV)


@torch.no_grad()
def prefix_change(model: LanguageModel, inputs_BT: Tensor, rng: np.random.Generator) -> float:
    """Give the largest relative change at the last position when its prefix is permuted."""
    order_T = torch.cat(
        (_derangement(inputs_BT.shape[1] - 1, rng), torch.tensor([inputs_BT.shape[1] - 1]))
    )
    last_BV = model.logits(inputs_BT)[:, -1]
    return _relative(model.logits(inputs_BT[:, order_T])[:, -1] - last_BV, last_BV)


@torch.no_grad()
def future_leak(model: LanguageModel, inputs_BT: Tensor, rng: np.random.Generator) -> float:
    """Give the largest relative change at a position when any single later token is another one."""
    del rng
    logits_BTV = model.logits(inputs_BT)
    largest = 0.0
    for time in range(1, inputs_BT.shape[1]):
        changed_BT = inputs_BT.clone()
        changed_BT[:, time] = (changed_BT[:, time] + 1) % model.embedding_VD.shape[0]
        before_BTV = model.logits(changed_BT)[:, :time] - logits_BTV[:, :time]
        largest = max(largest, _relative(before_BTV, logits_BTV))
    return largest


def _relative(change: Tensor, logits: Tensor) -> float:
    return float(change.abs().max() / logits.abs().max())


def _derangement(length: int, rng: np.random.Generator) -> Tensor:
    """Give an order in which no token keeps its place: a cycle through all, in random order."""
    cycle = rng.permutation(length)
    order = np.empty(length, dtype=np.int64)
    order[cycle] = np.roll(cycle, 1)
    return torch.from_numpy(order)
