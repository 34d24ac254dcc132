"""What a run finds when it starts again: results, checkpoints, and the account of its time."""

import shutil
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError
from pipeline.tracking.events import read_events
from pipeline.training.attempts import ACCOUNT
from pipeline.training.checkpoint_files import list_checkpoints, verify_checkpoint
from tests.training.rank_pool import RankPool
from tests.training.runs import HALF, NUM_STEPS, Runs, every_step, losses, train_rank

pytestmark = pytest.mark.slow


def test_finished_run_is_not_trained_again(two_ranks: RankPool, runs: Runs) -> None:
    run_dir = runs.make("run", every_step("gpt", 0))
    first = two_ranks.run(train_rank, run_dir)
    before = (run_dir / "events.jsonl").read_bytes()
    assert two_ranks.run(train_rank, run_dir) == first
    assert (run_dir / "events.jsonl").read_bytes() == before


def test_lost_result_is_written_again_from_the_last_checkpoint(
    two_ranks: RankPool, runs: Runs
) -> None:
    run_dir = runs.make("run", every_step("gpt", 3))
    first = two_ranks.run(train_rank, run_dir)[0]
    (run_dir / "result.json").unlink()
    second = two_ranks.run(train_rank, run_dir)[0]
    assert second.per_position_loss == first.per_position_loss
    assert (second.steps, second.attempts) == (NUM_STEPS, 2)
    # The steps were taken by the first attempt; the second adds its own start and evaluation.
    assert second.goodput["train_seconds"] == first.goodput["train_seconds"]
    assert second.goodput["wall_seconds"] > first.goodput["wall_seconds"]
    # No step was taken, so what a step measures is absent and not invented.
    assert second.model_state_bytes is None
    assert "perf/step_seconds" not in second.metrics


def test_damaged_checkpoint_is_passed_over_and_named(two_ranks: RankPool, runs: Runs) -> None:
    run = every_step("gpt", 1, checkpoint={"every_steps": 3})
    whole, halves = runs.make("whole", run), runs.make("halves", run)
    two_ranks.run(train_rank, whole)
    two_ranks.run(train_rank, halves, 9)
    newest, older = list_checkpoints(halves)
    assert [newest.name, older.name] == ["step-00000009", "step-00000006"]
    damaged = sorted(newest.glob("exp_avg-*.safetensors"))[1]
    flip_a_byte(damaged)

    two_ranks.run(train_rank, halves)
    resume = next(e for e in read_events(halves / "events.jsonl") if e.kind == "resume")
    assert resume.step == 6
    assert damaged.name in resume.values["passed_over"][0]
    assert losses(halves) == losses(whole)
    assert [p.name for p in list_checkpoints(halves)] == ["step-00000012", "step-00000009"]
    for checkpoint in list_checkpoints(halves):
        verify_checkpoint(checkpoint)


def test_account_of_a_resumed_run_covers_all_attempts(two_ranks: RankPool, runs: Runs) -> None:
    run_dir = runs.make("run", every_step("gpt", 1))
    two_ranks.run(train_rank, run_dir, HALF)
    two_ranks.run(train_rank, run_dir, HALF + 2)
    shutil.rmtree(list_checkpoints(run_dir)[0])
    before = read_events(run_dir / "events.jsonl")
    result = two_ranks.run(train_rank, run_dir)[0]

    kept = [e for e in before if e.kind == "checkpoint"][0].values[ACCOUNT]
    trained = before[-1].values[ACCOUNT]["train"]
    # Two steps were taken again, from the checkpoint that was left.
    assert result.goodput["lost_seconds"] == pytest.approx(trained - kept["train"])
    assert result.goodput["lost_seconds"] > 0.0
    assert result.goodput["train_seconds"] > kept["train"]
    # Between the attempts, which ended as agreed, the run stood idle and did not progress.
    running = result.goodput["wall_seconds"] - result.goodput["idle_seconds"]
    assert result.metrics["progress/seconds"].value == running
    parts = {k: v for k, v in result.goodput.items() if k != "wall_seconds"}
    assert sum(parts.values()) == pytest.approx(result.goodput["wall_seconds"], rel=0.01)
    fraction = result.goodput["train_seconds"] / running
    assert result.metrics["perf/goodput_fraction"].value == fraction


def test_two_intact_checkpoints_stay_after_a_newer_one_was_passed_over(
    two_ranks: RankPool, runs: Runs
) -> None:
    run_dir = runs.make("run", every_step("gpt", 1, checkpoint={"every_steps": 3}))
    two_ranks.run(train_rank, run_dir, 9)
    flip_a_byte(next(list_checkpoints(run_dir)[0].glob("exp_avg-*.safetensors")))
    two_ranks.run(train_rank, run_dir, 7)
    assert [p.name for p in list_checkpoints(run_dir)] == ["step-00000007", "step-00000006"]
    for checkpoint in list_checkpoints(run_dir):
        verify_checkpoint(checkpoint)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_resume_without_an_intact_checkpoint_is_an_error(two_ranks: RankPool, runs: Runs) -> None:
    run_dir = runs.make("run", every_step("gpt", 1))
    two_ranks.run(train_rank, run_dir, 3)
    (list_checkpoints(run_dir)[0] / "manifest.json").unlink()
    errors = two_ranks.run(train_rank, run_dir)
    assert all(isinstance(e, CheckpointError) and "none is intact" in str(e) for e in errors)
