import math
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.batching import plan_batches
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenBatch
from pipeline.errors import TrainingDiverged
from pipeline.models import build_model
from pipeline.training.distributed import RankContext
from pipeline.training.engine import Engine, StepOutcome, build_engine
from pipeline.training.guard import SkippedSteps, count_skip
from tests.training.cases import VOCAB_SIZE, my_batches, small_run
from tests.training.rank_pool import RankPool

POISONS = {"nan_loss": 58, "infinite_loss": 59, "nan_gradient": 60}
"""Token ids that make the model below misbehave when they stand first in a micro-batch."""


class Brittle(torch.nn.Module):
    """A model of ours that turns certain inputs into numbers that are not finite."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        nll_BT: torch.Tensor = self.model(inputs_BT, labels_BT)
        first = int(inputs_BT[0, 0])
        if first == POISONS["nan_loss"]:
            return nll_BT * math.nan
        if first == POISONS["infinite_loss"]:
            # The gradient of the sum stays finite.
            return nll_BT + math.inf
        if first == POISONS["nan_gradient"]:
            # sqrt has an infinite slope at 0, and 0 times it is nan; the loss stays what it was.
            return nll_BT + torch.sqrt(nll_BT * 0.0)
        return nll_BT


def brittle_engine(ranks: RankContext, run: RunConfig, name: str) -> Engine:
    model = Brittle(build_model(run.model, VOCAB_SIZE, run.seed))
    return build_engine(model, run, plan_batches(run.train, ranks.world_size), ranks, name)


def clean_batches(ranks: RankContext, step: int) -> list[TokenBatch]:
    batches = my_batches(ranks, step)
    for batch in batches:
        batch.inputs[0, 0] %= min(POISONS.values())
    return batches


def train_with_poison(
    ranks: RankContext, run: RunConfig, poisons: list[str | None], name: str = "deepspeed"
) -> tuple[list[StepOutcome], dict[str, Any], int]:
    """Take a step for each entry; rank 1's first micro-batch of a poisoned one is bad."""
    engine = brittle_engine(ranks, run, name)
    outcomes = []
    for poison in poisons:
        # Poisoned steps read other tokens, so that a trace of them in the weights would show.
        applied = sum(outcome.applied for outcome in outcomes)
        batches = clean_batches(ranks, applied if poison is None else 100)
        if poison is not None and ranks.rank == 1:
            batches[0].inputs[0, 0] = POISONS[poison]
        outcomes.append(engine.train_step(batches, 3e-3))
    state = engine.export_state()
    tensors = {
        f"{kind}/{name}": tensor.numpy()
        for kind in ("parameters", "exp_avg", "exp_avg_sq")
        for name, tensor in getattr(state, kind).items()
    }
    return outcomes, tensors, state.step


POISONED: list[str | None] = [
    None, "nan_loss", None, "infinite_loss", "infinite_loss", None, "nan_gradient", None
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_step_that_is_not_finite_on_one_rank_leaves_no_trace(
    two_ranks: RankPool, stage: int, precision: str
) -> None:
    run = small_run("gpt", stage, precision=precision)
    clean: list[str | None] = [p for p in POISONED if p is None]
    faulted = two_ranks.run(train_with_poison, run, POISONED)
    unfaulted = two_ranks.run(train_with_poison, run, clean)
    for (outcomes, tensors, step), (_, expected, expected_step) in zip(
        faulted, unfaulted, strict=True
    ):
        assert [o.applied for o in outcomes] == [poison is None for poison in POISONED]
        for outcome, poison in zip(outcomes, POISONED, strict=True):
            is_finite_loss = poison in (None, "nan_gradient")
            assert math.isfinite(outcome.loss_sum) == is_finite_loss
            assert math.isfinite(outcome.grad_norm) == (poison is None)
        assert step == expected_step == len(clean)
        assert tensors.keys() == expected.keys()
        for name, value in tensors.items():
            assert np.array_equal(value, expected[name]), name


@pytest.mark.slow
def test_oracle_leaves_out_the_same_steps(two_ranks: RankPool) -> None:
    outcomes, tensors, _ = two_ranks.run(train_with_poison, small_run("gpt"), POISONED, "torch")[0]
    assert [o.applied for o in outcomes] == [poison is None for poison in POISONED]
    assert all(np.isfinite(value).all() for value in tensors.values())


def outcome(applied: bool) -> StepOutcome:
    return StepOutcome(
        loss_sum=math.nan, text_loss_sum=math.nan, num_tokens=8, grad_norm=math.inf,
        applied=applied, forward_seconds=0.0, backward_seconds=0.0, optimizer_seconds=0.0,
    )  # fmt: skip


def test_run_ends_when_too_many_steps_in_a_row_are_skipped() -> None:
    skipped = SkippedSteps()
    for step in range(1, 3):
        skipped = count_skip(skipped, outcome(applied=False), step, max_in_a_row=3)
    assert (skipped.total, skipped.in_a_row) == (2, 2)
    with pytest.raises(TrainingDiverged, match="3 steps in a row up to step 3"):
        count_skip(skipped, outcome(applied=False), 3, max_in_a_row=3)


def test_applied_step_ends_the_row_and_keeps_the_total() -> None:
    skipped = count_skip(SkippedSteps(total=2, in_a_row=2), outcome(applied=True), 3, 3)
    assert (skipped.total, skipped.in_a_row) == (2, 0)
