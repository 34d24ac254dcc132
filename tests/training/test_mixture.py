"""Training on several sources by weight: counts, and resumes that stay on the mixed stream."""

from pathlib import Path

import pytest

from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.tracking.replica_study import plan_replicas
from pipeline.tracking.store import read_result
from tests.training.cases import GLOBAL_BATCH_SAMPLES, SEQUENCE_TOKENS, write_prepared
from tests.training.rank_pool import RankPool
from tests.training.runs import (
    NUM_STEPS,
    Runs,
    every_step,
    lineage,
    losses,
    manifest_of,
    train_rank,
)

pytestmark = pytest.mark.slow
SIZES = {"code": 10, "web": 20, "books": 30}
"""Samples of each source."""
WEIGHTS = {"code": 2.0, "web": 1.0, "books": 1.0}
NUM_SAMPLES = NUM_STEPS * GLOBAL_BATCH_SAMPLES


@pytest.fixture
def mixed_runs(tmp_path: Path) -> Runs:
    tokens = {name: size * SEQUENCE_TOKENS + 1 for name, size in SIZES.items()}
    return Runs(tmp_path, write_prepared(tmp_path / "prepared", tokens))


def mixed(weights: dict[str, float]) -> RunConfig:
    tree = every_step("gpt", 1).model_dump()
    source = {"kind": "jsonl", "path": "unread.jsonl"}
    tree["data"] |= {"sources": dict.fromkeys(SIZES, source), "mixture": {"weights": weights}}
    return RunConfig.model_validate(tree)


def test_training_on_three_sources_counts_each_by_its_weight(
    two_ranks: RankPool, mixed_runs: Runs
) -> None:
    run_dir = mixed_runs.make("run", mixed(WEIGHTS))
    result = two_ranks.run(train_rank, run_dir)[0]
    # 96 samples at shares of 1/2, 1/4 and 1/4.
    expected = {"code": 48, "web": 24, "books": 24}
    assert {name: read.samples for name, read in result.sources.items()} == expected
    for name, read in result.sources.items():
        assert read.tokens == expected[name] * SEQUENCE_TOKENS
        assert read.epochs == expected[name] / SIZES[name]
    assert sum(read.tokens for read in result.sources.values()) == result.tokens
    for event in (event for event in lineage(run_dir) if event.kind == "train"):
        taken = event.step * GLOBAL_BATCH_SAMPLES
        counts = {name: count["samples"] for name, count in event.values["sources"].items()}
        assert sum(counts.values()) == taken
        for name, count in counts.items():
            assert abs(count - taken * expected[name] / NUM_SAMPLES) < 1.0
    ((shown,),) = [replica.children for replica in plan_replicas(run_dir, is_over=True)]
    points = {point.name: point.value for point in shown.points if point.name.startswith("source/")}
    assert points["source/code/epochs"] == 4.8
    assert points["source/books/tokens"] == 24 * SEQUENCE_TOKENS
    assert len(points) == 6


def test_resumes_past_epochs_at_other_world_sizes_stay_on_the_curve(
    two_ranks: RankPool, one_rank: RankPool, mixed_runs: Runs
) -> None:
    whole, parts = (mixed_runs.make(name, mixed(WEIGHTS)) for name in ("whole", "parts"))
    two_ranks.run(train_rank, whole)
    two_ranks.run(train_rank, parts, 4)
    # 16 samples of code are 1.6 passes over it.
    assert manifest_of(parts).samples == 4 * GLOBAL_BATCH_SAMPLES
    one_rank.run(train_rank, parts, 7)
    two_ranks.run(train_rank, parts)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert read_result(parts).attempts == 3
    assert read_result(parts).sources == read_result(whole).sources


def test_a_resume_with_other_weights_is_refused(two_ranks: RankPool, mixed_runs: Runs) -> None:
    run_dir = mixed_runs.make("run", mixed(WEIGHTS))
    two_ranks.run(train_rank, run_dir, 3)
    other = mixed_runs.make("other", mixed(WEIGHTS | {"code": 1.0}))
    (other / "run.yaml").replace(run_dir / "run.yaml")
    for error in two_ranks.run(train_rank, run_dir):
        assert isinstance(error, ConfigError)
        assert "another config" in str(error)
