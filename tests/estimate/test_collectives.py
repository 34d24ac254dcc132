"""Collectives and model state against what DeepSpeed does on real ranks, call by call."""

from collections import Counter
from typing import Any

import pytest

from pipeline.config.schema import RunConfig
from pipeline.estimate.collectives import collectives
from pipeline.estimate.state import state_bytes
from pipeline.training.device import peak_memory
from pipeline.training.distributed import RankContext, gather_json
from pipeline.training.engine import StateBytes
from pipeline.training.loop import agree
from pipeline.training.stragglers import RankTimes
from tests.estimate.conftest import Pools
from tests.estimate.counting import CollectiveLog
from tests.training.cases import VOCAB_SIZE, my_batches, small_engine, small_run

Calls = Counter[tuple[str, int]]


def count_step(ranks: RankContext, run: RunConfig) -> tuple[Calls, StateBytes]:
    """Count the third step, when ZeRO 3 has recorded its trace."""
    engine, _ = small_engine(ranks, run)
    for step in range(2):
        engine.train_step(my_batches(ranks, step), 1e-3)
    with CollectiveLog() as log:
        engine.train_step(my_batches(ranks, 2), 1e-3)
        agree(ranks, [0.0, 0.0, 0.0, 1.0, 7.0], RankTimes(data_seconds=0.0, forward_seconds=1.0))
    return log.counts(), engine.state_bytes()


def expected_state(run: RunConfig, world_size: int, rank: int) -> StateBytes:
    state = state_bytes(run, VOCAB_SIZE, world_size, rank)
    return StateBytes(
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.moments + state.master_weights,
    )


def count_logging(ranks: RankContext) -> Calls:
    with CollectiveLog() as log:
        gather_json(peak_memory(ranks.device), ranks)
    return log.counts()


def expected_calls(run: RunConfig, world_size: int) -> Calls:
    calls: Calls = Counter()
    for row in collectives(run, VOCAB_SIZE, world_size):
        if row.when != "log":
            calls[row.op, row.bytes] += row.times
    return calls


UNTIED = {"tied_head": False, "qk_norm": True, "biases": True}
ADDITIVE = {"attention": "additive", "attention_after": "second_last", "hidden_width": 40}
VARIANTS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    # The largest matrix has 5,808 elements and is cut at the borders of the ranks' parts.
    ("gpt", {"zero": {"bucket_elements": 1000}}, (1, 2, 3)),
    ("gpt", {"zero": {"bucket_elements": 10**9}}, (3,)),
    ("gpt", {"model": UNTIED, "train": {"activation_checkpointing": True}}, (2, 3)),
    ("gpt", {"precision": "bf16"}, (0, 2, 3)),
    ("gpt", {"train": {"optimizer": {"gradient_clipping": 0.0}}}, (0,)),
    ("lstm_attention", {"model": ADDITIVE, "zero": {"param_persistence_threshold": 100}}, (2, 3)),
    ("lstm_attention", {"model": {"cell": "gru", "attention": "dot", "tied_head": False}}, (2, 3)),
    ("lstm_attention", {"train": {"activation_checkpointing": True}}, (3,)),
]
CASES = [(family, fields, stage) for family, fields, stages in VARIANTS for stage in stages]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(
    ("world_size", "family"),
    [(1, "gpt"), (2, "gpt"), (2, "lstm_attention"), (4, "lstm_attention")],
)
def test_collectives_equal_those_of_a_real_step(
    pools: Pools, world_size: int, family: str, stage: int
) -> None:
    run = small_run(family, stage)
    replies = pools[world_size, stage == 3].run(count_step, run)
    for rank, (calls, held) in enumerate(replies):
        assert calls == expected_calls(run, world_size)
        assert held == expected_state(run, world_size, rank)


@pytest.mark.parametrize(("family", "fields", "stage"), CASES)
def test_collectives_equal_those_of_other_models_and_buckets(
    pools: Pools, family: str, fields: dict[str, Any], stage: int
) -> None:
    run = small_run(family, stage, **fields)
    for calls, _ in pools[2, stage == 3].run(count_step, run):
        assert calls == expected_calls(run, 2)


def test_a_logged_step_adds_two_collectives_of_the_expected_size(pools: Pools) -> None:
    rows = [r for r in collectives(small_run(), VOCAB_SIZE, 2) if r.when == "log"]
    assert {row.every_steps for row in rows} == {10}
    (_, lengths), (_, texts) = sorted(pools[2, False].run(count_logging)[0])[::-1]
    assert lengths == 16
    # Digits of the two numbers of bytes in its text.
    assert sum(r.bytes for r in rows if r.op == "all_gather") == pytest.approx(texts, rel=0.1)


def test_a_step_of_four_thousand_ranks_is_counted_at_once() -> None:
    """By the sizes of the parts: stage 3 gathers all weights once forward, padded to the ranks."""
    model = {"width": 4096, "depth": 32, "heads": 32, "vocab_size": 128_256, "max_positions": 8192}
    tokens = 4096 * 8192
    train = {
        "global_batch_tokens": tokens, "sequence_tokens": 8192, "micro_batch_samples": 1,
        "total_tokens": tokens,
    }  # fmt: skip
    for stage in range(4):
        run = RunConfig.model_validate(
            {"model": {"family": "gpt", **model}, "train": train, "zero": {"stage": stage}}
        )
        rows = collectives(run, 128_256, 4096)
        size = 4 * run.model.num_parameters(128_256).total
        gradients = sum(row.total_bytes for row in rows if row.name == "gradients")
        assert gradients == pytest.approx(size, rel=1e-4)
        gathers = [row for row in rows if row.op == "all_gather" and row.when != "log"]
        forward = sum(row.total_bytes for row in gathers if row.when == "forward")
        assert forward == (pytest.approx(size, rel=1e-4) if stage == 3 else 0)
        assert sum(row.total_bytes for row in gathers) >= (size if stage else 0)
