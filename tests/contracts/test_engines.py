"""What every engine of `ENGINES` promises, over two real ranks."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pipeline.training import ENGINES
from pipeline.training.distributed import RankContext
from pipeline.training.engine import StepOutcome
from tests.training.cases import my_batches, small_engine, small_run
from tests.training.rank_pool import RankPool

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", sorted(ENGINES))]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.stop()


def repeat_one_batch(ranks: RankContext, name: str) -> list[StepOutcome]:
    engine, _ = small_engine(ranks, small_run("lstm_attention"), name)
    return [engine.train_step(my_batches(ranks, 0), 1e-2) for _ in range(30)]


def test_repeated_batch_is_learnt(two_ranks: RankPool, name: str) -> None:
    outcomes = two_ranks.run(repeat_one_batch, name)[0]
    assert outcomes[-1].loss < 0.7 * outcomes[0].loss


def test_outcome_counts_labels_of_all_ranks_and_times_its_phases(
    two_ranks: RankPool, name: str
) -> None:
    replies = two_ranks.run(repeat_one_batch, name)
    first = replies[0][0]
    # 8 samples of 16 labels; of one micro-batch, two samples, the last label is ignored.
    assert first.num_tokens == 8 * 16 - 2
    assert first.loss_sum == pytest.approx(first.loss * first.num_tokens)
    for outcome in replies[1]:
        assert outcome.forward_seconds > 0.0
        assert outcome.backward_seconds > 0.0
        assert outcome.optimizer_seconds > 0.0


def step_with_rate_zero(ranks: RankContext, name: str) -> tuple[bool, float, bool]:
    engine, _ = small_engine(ranks, small_run("gpt"), name)
    before = engine.export_state()
    outcome = engine.train_step(my_batches(ranks, 0), 0.0)
    after = engine.export_state()
    is_same = all(bool((before.parameters[k] == v).all()) for k, v in after.parameters.items())
    has_moments = all(bool(v.any()) for k, v in after.exp_avg.items() if k == "embedding_VD")
    return is_same, outcome.grad_norm, has_moments and (before.step, after.step) == (0, 1)


def test_rate_of_zero_moves_moments_and_no_weight(two_ranks: RankPool, name: str) -> None:
    for is_same, grad_norm, has_moved in two_ranks.run(step_with_rate_zero, name):
        assert is_same
        assert grad_norm > 0.0
        assert has_moved


def continue_elsewhere(ranks: RankContext, name: str) -> tuple[list[float], list[float]]:
    first, _ = small_engine(ranks, small_run("gpt"), name)
    for step in range(3):
        first.train_step(my_batches(ranks, step), 1e-2)
    second, _ = small_engine(ranks, small_run("gpt", seed=1), name)
    second.import_state(first.export_state())
    curves = [
        [engine.train_step(my_batches(ranks, step), 1e-2).loss for step in range(3, 6)]
        for engine in (first, second)
    ]
    return curves[0], curves[1]


def test_imported_state_continues_bit_for_bit(two_ranks: RankPool, name: str) -> None:
    for first, second in two_ranks.run(continue_elsewhere, name):
        assert first == second


APART = {"reset_positions": True, "mask_attention": True, "reset_state": True}


def score_with_another_start(ranks: RankContext, name: str, apart: bool) -> np.ndarray:
    """How far the losses move when the first document of a sample of two changes."""
    documents = APART if apart else {}
    run = small_run("lstm_attention", train={"documents": documents})
    engine, _ = small_engine(ranks, run, name)
    batches = []
    for first in (3, 4):
        inputs = np.tile(np.arange(5, 21), (2, 1))
        inputs[:, 0], inputs[:, 7] = first, 0
        batches.append(replace(my_batches(ranks, 0)[0], inputs=inputs))
    return np.abs(engine.evaluate(batches[0]) - engine.evaluate(batches[1]))


@pytest.mark.parametrize("apart", [True, False])
def test_evaluation_keeps_documents_apart_as_training_does(
    two_ranks: RankPool, name: str, apart: bool
) -> None:
    for shift in two_ranks.run(score_with_another_start, name, apart):
        assert shift[:, :8].max() > 0.0
        assert (shift[:, 8:].max() == 0.0) == apart


def evaluate_twice(ranks: RankContext, name: str) -> tuple[bool, bool]:
    engine, _ = small_engine(ranks, small_run("gpt"), name)
    engine.train_step(my_batches(ranks, 0), 1e-2)
    batch = my_batches(ranks, 1)[0]
    before = engine.export_state()
    scores = [engine.evaluate(batch) for _ in range(2)]
    after = engine.export_state()
    is_same = all(bool((before.parameters[k] == v).all()) for k, v in after.parameters.items())
    return is_same, bool(np.array_equal(*scores))


def test_evaluation_is_repeatable_and_changes_nothing(two_ranks: RankPool, name: str) -> None:
    assert two_ranks.run(evaluate_twice, name) == [(True, True)] * 2


def ask_for_bytes(ranks: RankContext, name: str) -> tuple[str, int]:
    engine, _ = small_engine(ranks, small_run("gpt"), name)
    with pytest.raises(RuntimeError) as caught:
        engine.state_bytes()
    engine.train_step(my_batches(ranks, 0), 0.0)
    measured = engine.state_bytes()
    return str(caught.value), measured.parameters + measured.gradients + measured.optimizer


def test_state_bytes_are_measured_once_there_are_gradients(two_ranks: RankPool, name: str) -> None:
    num_parameters = small_run("gpt").model.num_parameters(61).total
    for message, num_bytes in two_ranks.run(ask_for_bytes, name):
        assert "needs one train_step" in message
        # fp32 at stage 0: weights, gradients and two moments of 4 bytes.
        assert num_bytes == pytest.approx(16 * num_parameters, rel=0.01)


def sum_text_losses(ranks: RankContext, name: str) -> tuple[float, float, float]:
    engine, _ = small_engine(ranks, small_run("gpt"), name)
    batches = my_batches(ranks, 0)
    nll = [engine.evaluate(batch) for batch in batches]
    mine = sum(
        float(losses[(batch.labels != 0) & (batch.labels != -100)].sum(dtype=np.float64))
        for losses, batch in zip(nll, batches, strict=True)
    )
    outcome = engine.train_step(batches, 0.0)
    return mine, outcome.text_loss_sum, outcome.loss_sum


def test_text_loss_leaves_out_the_ends_of_documents(two_ranks: RankPool, name: str) -> None:
    replies = two_ranks.run(sum_text_losses, name)
    expected = sum(mine for mine, _, _ in replies)
    for _, text_loss_sum, loss_sum in replies:
        assert text_loss_sum == pytest.approx(expected, rel=1e-6)
        assert text_loss_sum < loss_sum - 1.0
