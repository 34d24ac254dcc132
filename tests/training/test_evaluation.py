import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.data.loader import TokenBatch
from pipeline.data.shards import ShardSet, load_manifest
from pipeline.training.distributed import RankContext
from pipeline.training.evaluation import EvalOutcome, build_evaluator
from tests.training.cases import small_engine, small_run, write_prepared
from tests.training.rank_pool import RankPool


def evaluate_small(
    ranks: RankContext, prepared_dir: Path, stage: int, max_tokens: int | None
) -> EvalOutcome:
    run = small_run("gpt", stage, eval={"max_tokens": max_tokens})
    engine, _ = small_engine(ranks, run)
    shards = ShardSet(load_manifest(prepared_dir), "validation")
    evaluator = build_evaluator(run, shards, ranks)
    return evaluator.evaluate(engine)


def outcomes_agree(one: EvalOutcome, two: EvalOutcome) -> None:
    assert one.num_tokens == two.num_tokens
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert one.bits_per_byte == pytest.approx(two.bits_per_byte, rel=1e-6)
    assert one.per_position_loss == pytest.approx(two.per_position_loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("validation_tokens", "max_tokens"), [(410, None), (101, None), (410, 50)])
def test_evaluation_does_not_depend_on_the_world_size(
    tmp_path: Path,
    one_rank: RankPool,
    two_ranks: RankPool,
    validation_tokens: int,
    max_tokens: int | None,
) -> None:
    prepared_dir = write_prepared(tmp_path / "data", validation_tokens=validation_tokens)
    one = one_rank.run(evaluate_small, prepared_dir, 0, max_tokens)[0]
    for stage in (1, 3):
        two = two_ranks.run(evaluate_small, prepared_dir, stage, max_tokens)
        assert two[0] == two[1]
        outcomes_agree(one, two[0])
    assert one.num_tokens == min(validation_tokens - 1, max_tokens or validation_tokens)


class ConstantEngine:
    """Gives each label a loss of its position plus one, and takes no step."""

    def evaluate(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        losses = np.arange(1, batch.labels.shape[1] + 1, dtype=np.float32)
        return np.where(batch.labels != -100, losses, np.float32(np.nan))


def score_constant(ranks: RankContext, prepared_dir: Path) -> tuple[EvalOutcome, Sequence[int]]:
    run = small_run("gpt")
    shards = ShardSet(load_manifest(prepared_dir), "validation")
    outcome = build_evaluator(run, shards, ranks).evaluate(ConstantEngine())
    return outcome, shards.tokens(1, shards.num_tokens).tolist()


@pytest.mark.slow
def test_scores_are_those_counted_by_hand(tmp_path: Path, one_rank: RankPool) -> None:
    prepared_dir = write_prepared(tmp_path / "data", validation_tokens=101)
    outcome, labels = one_rank.run(score_constant, prepared_dir)[0]
    losses = [i % 16 + 1 for i in range(100)]
    assert outcome.loss == pytest.approx(sum(losses) / 100)
    assert outcome.per_position_loss == list(range(1, 17))
    # Id k has k mod 5 + 1 bytes; id 0 ends a document and has none.
    num_bytes = sum(k % 5 + 1 for k in labels if k != 0)
    nll = sum(loss for loss, k in zip(losses, labels, strict=True) if k != 0)
    assert outcome.bits_per_byte == pytest.approx(nll / (math.log(2) * num_bytes))
    assert labels.count(0) == 2
