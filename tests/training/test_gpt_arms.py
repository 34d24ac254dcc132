"""Arms of the Transformer under real ZeRO over two ranks, against the torch oracle."""

from typing import Any

import pytest

from pipeline.config.schema import RunConfig
from pipeline.training.distributed import RankContext
from tests.training.cases import my_batches, small_engine, small_run
from tests.training.rank_pool import RankPool

pytestmark = pytest.mark.slow

ARMS: dict[str, dict[str, Any]] = {
    "gpt2": {"activation": "gelu_tanh", "biases": True},
    "llama": {
        "width": 36, "heads": 6, "positions": "rope", "norm": "rmsnorm", "kv_heads": 2,
        "tied_head": False, "qk_norm": True,
    },
    "alibi": {"positions": "alibi", "window_tokens": 5},
}  # fmt: skip


def losses_and_norms(ranks: RankContext, run: RunConfig, name: str) -> list[float]:
    engine, _ = small_engine(ranks, run, name)
    outcomes = [engine.train_step(my_batches(ranks, step), 3e-3) for step in range(3)]
    assert all(outcome.applied for outcome in outcomes)
    return [value for outcome in outcomes for value in (outcome.loss, outcome.grad_norm)]


@pytest.mark.parametrize("arm", ARMS)
def test_curves_of_every_arm_are_those_of_the_oracle_at_the_ends_of_zero(
    two_ranks: RankPool, arm: str
) -> None:
    again = {"activation_checkpointing": True}
    runs = [
        (small_run("gpt", 0, model=ARMS[arm]), "torch"),
        (small_run("gpt", 0, model=ARMS[arm], train=again), "deepspeed"),
        (small_run("gpt", 3, model=ARMS[arm], train=again), "deepspeed"),
    ]
    oracle, stage0, stage3 = (two_ranks.run(losses_and_norms, *run) for run in runs)
    assert oracle[0] == oracle[1]
    for curve in (*stage0, *stage3):
        assert curve == pytest.approx(oracle[0], rel=1e-4)
    assert oracle[0][-2] != oracle[0][0]
