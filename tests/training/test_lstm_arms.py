"""Arms of the LSTM family under real ZeRO over two ranks, against the torch oracle."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.batching import plan_batches
from pipeline.config.schema import RunConfig
from pipeline.models import build_model
from pipeline.models.documents import DocumentRule
from pipeline.models.execution import set_execution
from pipeline.training import ENGINES
from pipeline.training.distributed import RankContext
from pipeline.training.engine import build_engine
from tests.training.cases import VOCAB_SIZE, my_batches, small_engine, small_run
from tests.training.rank_pool import RankPool

pytestmark = pytest.mark.slow

ARMS: dict[str, dict[str, Any]] = {
    # What draws masks, recomputes in backward, or calls a layer once a token.
    "regularised": {
        "attention": "additive",
        "dropout": 0.1,
        "input_dropout": 0.2,
        "weight_drop": 0.3,
        "forget_bias": "chrono",
    },
    "fed": {"attention": "dot", "input_feeding": True},
    "scan": {"cell": "min_lstm", "hidden_width": 24, "window_tokens": 5},
    "vanilla": {
        "backbone": "vanilla",
        "feed_forward": False,
        "attention": "dot",
        "cell": "gru",
        "init_std": 0.2,
    },
}


APART = {"mask_attention": True, "reset_state": True}
TRAIN: dict[str, dict[str, Any]] = {
    "regularised": {"activation_checkpointing": True},
    "scan": {"documents": APART},
    "vanilla": {"documents": APART},
}


def losses_and_norms(ranks: RankContext, run: RunConfig, name: str) -> list[float]:
    # Masks come from the global generator, on each rank its own.
    torch.manual_seed(100 + ranks.rank)
    rule = DocumentRule(end_of_document_id=0, switches=run.train.documents)
    model = build_model(run.model, VOCAB_SIZE, run.seed, rule)
    set_execution(model, run.train)
    engine = build_engine(model, run, plan_batches(run.train, ranks.world_size), ranks, name)
    outcomes = [engine.train_step(my_batches(ranks, step), 3e-3) for step in range(3)]
    assert all(outcome.applied for outcome in outcomes)
    return [value for outcome in outcomes for value in (outcome.loss, outcome.grad_norm)]


@pytest.mark.parametrize("arm", ARMS)
def test_curves_of_every_arm_are_those_of_the_oracle_at_the_ends_of_zero(
    two_ranks: RankPool, arm: str
) -> None:
    runs = [
        small_run("lstm_attention", stage, model=ARMS[arm], train=TRAIN.get(arm, {}))
        for stage in (0, 0, 3)
    ]
    oracle, stage0, stage3 = (
        two_ranks.run(losses_and_norms, run, name)
        for run, name in zip(runs, ("torch", "deepspeed", "deepspeed"), strict=True)
    )
    assert oracle[0] == oracle[1]
    for curve in (*stage0, *stage3):
        assert curve == pytest.approx(oracle[0], rel=1e-4)
    assert oracle[0][-2] != oracle[0][0]


def scores_while_training(ranks: RankContext, run: RunConfig, name: str) -> bool:
    engine, _ = small_engine(ranks, run, name)
    batches = my_batches(ranks, 0)
    engine.train_step(batches, 0.0)
    scores = [engine.evaluate(batches[0]) for _ in range(2)]
    return bool(np.array_equal(*scores))


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_evaluation_drops_nothing(two_ranks: RankPool, name: str) -> None:
    run = small_run("lstm_attention", model=ARMS["regularised"])
    assert two_ranks.run(scores_while_training, run, name) == [True, True]
