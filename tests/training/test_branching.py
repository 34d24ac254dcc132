"""A run that branches off a trunk is the run that trained from step 0 under the same schedule."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import RunConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.tracking.events import read_events
from pipeline.tracking.store import read_result
from pipeline.training.branching import check_same_run
from pipeline.training.checkpoint_files import list_checkpoints
from tests.training.cases import GLOBAL_BATCH_SAMPLES, SEQUENCE_TOKENS, small_run, write_prepared
from tests.training.rank_pool import RankPool
from tests.training.runs import Runs, losses, train_rank

pytestmark = pytest.mark.slow

TRUNK_STEPS = 8
BRANCH_STEP = 4
BRANCH_STEPS = 6
"""Of which the last two cool down."""
WARMUP_STEPS = 2


def at_constant_rate(stage: int = 1, steps: int = TRUNK_STEPS, **fields: Any) -> RunConfig:
    """A run of so many steps, warmed up over two and cooled down over none."""
    schedule = {"kind": "wsd", "warmup_fraction": WARMUP_STEPS / steps, "decay_fraction": 0.0}
    train = {
        "total_tokens": steps * GLOBAL_BATCH_SAMPLES * SEQUENCE_TOKENS,
        "schedule": schedule | fields.pop("schedule", {}),
    }
    shared = {"eval": {"every_steps": None}, "tracking": {"log_every_steps": 1}}
    train |= fields.pop("train", {})
    return small_run("gpt", stage, train=train, **(shared | fields))


def cooled_down(branch: dict[str, Any] | None, **fields: Any) -> RunConfig:
    schedule = {"decay_fraction": 1 - BRANCH_STEP / BRANCH_STEPS}
    return at_constant_rate(steps=BRANCH_STEPS, schedule=schedule, branch=branch, **fields)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory, two_ranks: RankPool) -> Path:
    root = tmp_path_factory.mktemp("trunk")
    runs = Runs(root, write_prepared(root / "prepared"))
    checkpoint = {"keep_steps": [2, BRANCH_STEP]}
    run_dir = runs.make("trunk", at_constant_rate(checkpoint=checkpoint))
    two_ranks.run(train_rank, run_dir)
    assert read_result(run_dir).steps == TRUNK_STEPS
    return run_dir


def make(trunk: Path, name: str, run: RunConfig) -> Path:
    return Runs(trunk.parent, trunk.parent / "prepared").make(name, run)


def from_trunk(trunk: Path, step: int = BRANCH_STEP) -> dict[str, Any]:
    return {"run_dir": str(trunk), "step": step}


def test_named_steps_stay_beside_the_newest(trunk: Path) -> None:
    names = [path.name for path in list_checkpoints(trunk)]
    assert names == [f"step-{step:08d}" for step in (TRUNK_STEPS, BRANCH_STEP, 2)]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_branch_is_the_run_that_was_trained_from_the_start(
    two_ranks: RankPool, trunk: Path, stage: int
) -> None:
    zero = {"zero": {"stage": stage, "bucket_elements": 5_000}}
    whole = make(trunk, f"whole-{stage}", cooled_down(None, **zero))
    branch = make(trunk, f"branch-{stage}", cooled_down(from_trunk(trunk), **zero))
    assert two_ranks.run(train_rank, branch, BRANCH_STEP + 1) == [None, None]
    result = two_ranks.run(train_rank, branch)[0]
    expected = two_ranks.run(train_rank, whole)[0]

    assert sorted(losses(branch)) == [BRANCH_STEP + 1, BRANCH_STEPS]
    both = {**{step: losses(trunk)[step] for step in range(1, BRANCH_STEP + 1)}, **losses(branch)}
    assert both == pytest.approx(losses(whole), rel=1e-5)
    assert (result.steps, result.tokens) == (expected.steps, expected.tokens)
    assert result.metrics["eval/loss"].value == pytest.approx(
        expected.metrics["eval/loss"].value, rel=1e-5
    )
    first, *rest = read_events(branch / "events.jsonl")
    assert (first.kind, first.step) == ("start", BRANCH_STEP)
    assert first.values["branch"] == from_trunk(trunk)
    assert [(e.kind, e.step) for e in rest if e.kind == "resume"] == [("resume", BRANCH_STEP + 1)]


def refusal(two_ranks: RankPool, trunk: Path, name: str, run: RunConfig) -> Exception:
    errors = two_ranks.run(train_rank, make(trunk, name, run))
    assert type(errors[0]) is type(errors[1])
    assert isinstance(errors[0], Exception)
    return errors[0]


def test_another_run_is_no_trunk(two_ranks: RankPool, trunk: Path) -> None:
    branch = from_trunk(trunk)
    other = refusal(two_ranks, trunk, "seed", cooled_down(branch, seed=1))
    assert isinstance(other, ConfigError)
    assert "seed: 1 here, 0 there" in str(other)
    early = {"train": {"schedule": {"kind": "wsd", "warmup_fraction": 0.5, "decay_fraction": 0.2}}}
    other = refusal(two_ranks, trunk, "warm", cooled_down(branch, **early))
    assert isinstance(other, ConfigError)
    assert "took step 1 at the learning rate" in str(other)


def test_a_trunk_of_another_family_or_guard_is_told_by_its_fields(tmp_path: Path) -> None:
    run = small_run("gpt")
    with pytest.raises(ConfigError, match=r"model.family: gpt here, lstm_attention there"):
        check_same_run(run, small_run("lstm_attention"), tmp_path, 2)
    with pytest.raises(ConfigError, match=r"guard.spike: off here, skip there"):
        check_same_run(run, small_run("gpt", guard={"spike": "skip"}), tmp_path, 2)
    check_same_run(run, small_run("gpt", 3, guard={"watchdog_seconds": None}), tmp_path, 2)


def test_a_trunk_that_is_not_there_is_named_by_its_rank(two_ranks: RankPool, trunk: Path) -> None:
    elsewhere = {"run_dir": str(trunk / "elsewhere"), "step": BRANCH_STEP}
    absent = refusal(two_ranks, trunk, "nowhere", cooled_down(elsewhere))
    assert isinstance(absent, ConfigError)
    assert "holds no run to begin in: rank 0" in str(absent)


def test_checkpoint_that_is_not_there_is_named(two_ranks: RankPool, trunk: Path) -> None:
    absent = refusal(two_ranks, trunk, "absent", cooled_down(from_trunk(trunk, step=3)))
    assert isinstance(absent, CheckpointError)
    assert "checkpoint.keep_steps=[3]" in str(absent)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint": {"keep_steps": [9]}}, r"keep_steps=\[9\] lies beyond the run's 8 steps"),
        ({"branch": {"run_dir": "runs/trunk", "step": 8}}, "leaves nothing to train"),
    ],
)
def test_steps_that_never_come_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        at_constant_rate(**fields)
