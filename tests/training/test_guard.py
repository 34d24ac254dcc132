import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.batching import plan_batches
from pipeline.config.schema import GuardConfig, RunConfig
from pipeline.data.loader import TokenBatch
from pipeline.errors import TrainingDiverged
from pipeline.models import build_model
from pipeline.training.distributed import RankContext
from pipeline.training.engine import NO_LIMITS, Engine, StepLimits, StepOutcome, build_engine
from pipeline.training.guard import GuardState, SkippedSteps, check_policy, count_skip
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


LIMITS = {"high_loss": StepLimits(loss=0.1), "high_norm": StepLimits(grad_norm=1e-6)}
"""Limits that any step of the model is above, by one number."""


def train_with_poison(
    ranks: RankContext, run: RunConfig, poisons: list[str | None], name: str = "deepspeed"
) -> tuple[list[StepOutcome], dict[str, Any], int]:
    """Take a step for each entry; a poisoned one has limits, or a bad micro-batch on rank 1."""
    engine = brittle_engine(ranks, run, name)
    outcomes = []
    for poison in poisons:
        # Poisoned steps read other tokens, so that a trace of them in the weights would show.
        applied = sum(outcome.applied for outcome in outcomes)
        batches = clean_batches(ranks, applied if poison is None else 100)
        if poison in POISONS and ranks.rank == 1:
            batches[0].inputs[0, 0] = POISONS[poison]
        outcomes.append(engine.train_step(batches, 3e-3, LIMITS.get(poison or "", NO_LIMITS)))
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


LIMITED: list[str | None] = ["high_norm", None, "high_loss", "high_norm", None, "high_norm", None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"),
                             (1, "bf16")],
)  # fmt: skip
def test_finite_step_above_a_limit_leaves_no_trace(
    two_ranks: RankPool, stage: int, precision: str
) -> None:
    run = small_run("gpt", stage, precision=precision)
    clean: list[str | None] = [p for p in LIMITED if p is None]
    limited = two_ranks.run(train_with_poison, run, LIMITED)
    unlimited = two_ranks.run(train_with_poison, run, clean)
    for (outcomes, tensors, step), (_, expected, expected_step) in zip(
        limited, unlimited, strict=True
    ):
        assert [o.applied for o in outcomes] == [poison is None for poison in LIMITED]
        assert all(o.is_finite and o.grad_norm > 0.0 for o in outcomes)
        assert step == expected_step == len(clean)
        for name, value in tensors.items():
            assert np.array_equal(value, expected[name]), name


@pytest.mark.slow
def test_oracle_leaves_out_the_same_steps(two_ranks: RankPool) -> None:
    outcomes, tensors, _ = two_ranks.run(train_with_poison, small_run("gpt"), POISONED, "torch")[0]
    assert [o.applied for o in outcomes] == [poison is None for poison in POISONED]
    assert all(np.isfinite(value).all() for value in tensors.values())
    outcomes, _, step = two_ranks.run(train_with_poison, small_run("gpt"), LIMITED, "torch")[0]
    assert [o.applied for o in outcomes] == [poison is None for poison in LIMITED]
    assert step == LIMITED.count(None)


def outcome(applied: bool, loss_sum: float = math.nan, grad_norm: float = math.inf) -> StepOutcome:
    return StepOutcome(
        loss_sum=loss_sum, text_loss_sum=math.nan, num_tokens=8, grad_norm=grad_norm,
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


def filled(guard: GuardConfig, losses: list[float]) -> GuardState:
    state = GuardState()
    for loss in losses:
        state = state.after(outcome(True, loss_sum=8 * loss, grad_norm=10 * loss), guard)
    return state


def test_limit_is_mean_and_sigmas_of_the_newest_applied_steps() -> None:
    guard = GuardConfig(spike="skip", spike_window_steps=4, spike_sigmas=6.0)
    state = filled(guard, [100.0, 1.0, 2.0, 3.0, 4.0])
    # Mean 2.5; squared deviations 2.25, 0.25, 0.25, 2.25 over 3: deviation sqrt(5 / 3).
    assert state.limits(guard).loss == pytest.approx(2.5 + 6.0 * math.sqrt(5.0 / 3.0))
    assert state.limits(guard).grad_norm == pytest.approx(25.0 + 60.0 * math.sqrt(5.0 / 3.0))
    assert GuardState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_no_limit_before_half_a_window_and_none_where_nothing_varies() -> None:
    guard = GuardConfig(spike="skip", spike_window_steps=8)
    assert filled(guard, [1.0, 2.0, 3.0]).limits(guard) == NO_LIMITS
    assert filled(guard, [1.0, 2.0, 3.0, 4.0]).limits(guard) != NO_LIMITS
    assert filled(guard, [2.0] * 8).limits(guard) == NO_LIMITS
    off = GuardConfig(spike="off", spike_window_steps=8)
    assert filled(guard, [1.0, 2.0] * 4).limits(off) == NO_LIMITS


def test_steps_that_were_not_applied_stay_out_of_the_window() -> None:
    guard = GuardConfig(spike="skip", spike_window_steps=8)
    state = filled(guard, [1.0, 2.0, 3.0, 4.0])
    after_nan = state.after(outcome(False), guard)
    assert after_nan == state
    after_spike = state.after(outcome(False, loss_sum=800.0, grad_norm=1.0), guard)
    assert after_spike.losses == state.losses
    assert after_spike.num_spikes == 1


def test_policy_ends_the_run_at_a_spike_or_after_enough_rewinds() -> None:
    spike = outcome(False, loss_sum=80.0, grad_norm=1.0)
    limits = StepLimits(loss=5.0, grad_norm=2.0)
    window = GuardState(losses=(1.0,) * 64, grad_norms=(1.0,) * 64, num_rewinds=2)
    with pytest.raises(TrainingDiverged, match=r"step 9 is a spike: loss 10 above 5 \("):
        check_policy(GuardConfig(spike="raise"), window, spike, limits, 9)
    with pytest.raises(TrainingDiverged, match="after 2 rewinds"):
        check_policy(GuardConfig(spike="rewind", max_rewinds=2), window, spike, limits, 9)
    # None of these raises: what is not finite is no spike, whatever the policy.
    check_policy(GuardConfig(spike="raise"), window, outcome(False), limits, 9)
    check_policy(GuardConfig(spike="rewind", max_rewinds=3), window, spike, limits, 9)
    check_policy(GuardConfig(spike="skip"), window, spike, limits, 9)


def test_rewind_without_checkpoints_is_refused_with_the_field_to_set() -> None:
    with pytest.raises(ValueError, match="checkpoint.every_steps is null"):
        small_run("gpt", guard={"spike": "rewind"})
