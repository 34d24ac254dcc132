"""Real ranks that keep documents apart, at the stage that splits parameters as well."""

import pytest

from pipeline.config.schema import RunConfig
from pipeline.tracking.store import RunResult
from tests.training.cases import MODELS
from tests.training.rank_pool import RankPool
from tests.training.runs import Runs, every_step, losses, train_rank

pytestmark = pytest.mark.slow
NUM_STEPS = 6
APART = {"reset_positions": True, "mask_attention": True, "reset_state": True}


def keep_apart(run: RunConfig) -> RunConfig:
    tree = run.model_dump()
    tree["train"] |= {"documents": APART, "total_tokens": NUM_STEPS * run.train.global_batch_tokens}
    return RunConfig.model_validate(tree)


@pytest.mark.parametrize("family", MODELS)
def test_zero_3_trains_documents_apart_as_one_rank_does(
    two_ranks: RankPool, one_rank: RankPool, runs: Runs, family: str
) -> None:
    split = runs.make("split", keep_apart(every_step(family, 3)))
    alone = runs.make("alone", keep_apart(every_step(family, 0)))
    results = [
        pool.run(train_rank, run_dir)[0]
        for run_dir, pool in ((split, two_ranks), (alone, one_rank))
    ]
    assert all(isinstance(result, RunResult) for result in results)
    assert losses(split) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(split)[NUM_STEPS] < losses(split)[1] - 0.1
    scores = [result.metrics["eval/loss"].value for result in results]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
