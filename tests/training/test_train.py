import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import RunConfig
from pipeline.errors import (
    ConfigError,
    DataError,
    TrainingDiverged,
)
from pipeline.tracking.events import read_events
from pipeline.tracking.store import RunResult, read_result, read_verdict
from pipeline.training.distributed import RankContext
from tests.training.cases import GLOBAL_BATCH_SAMPLES, SEQUENCE_TOKENS, small_run, write_prepared
from tests.training.cases import write_run as write_run_dir
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

MOMENT = 3
"""Step of six after which a short run stops."""


def short(family: str, stage: int, **fields: Any) -> RunConfig:
    """Six steps with an evaluation of eight samples after every second."""
    scored = {"every_steps": 2, "max_tokens": 8 * SEQUENCE_TOKENS}
    run = every_step(family, stage, eval=scored, **fields)
    total_tokens = 2 * MOMENT * run.train.global_batch_tokens
    return run.model_copy(
        update={"train": run.train.model_copy(update={"total_tokens": total_tokens})}
    )


@pytest.mark.parametrize("stage", [0, 2])
def test_bf16_run_resumes_bit_for_bit_as_well(two_ranks: RankPool, runs: Runs, stage: int) -> None:
    run = short("gpt", stage, precision="bf16")
    whole, halves = runs.make("whole", run), runs.make("halves", run)
    two_ranks.run(train_rank, whole)
    two_ranks.run(train_rank, halves, MOMENT)
    two_ranks.run(train_rank, halves)
    assert losses(halves) == losses(whole)


@pytest.mark.parametrize(
    ("family", "stage"),
    [("gpt", 0), ("gpt", 1), ("gpt", 2), ("gpt", 3), ("lstm_attention", 0), ("lstm_attention", 3)],
)
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    two_ranks: RankPool, runs: Runs, family: str, stage: int
) -> None:
    run = short(family, stage)
    whole, halves = runs.make("whole", run), runs.make("halves", run)
    assert isinstance(two_ranks.run(train_rank, whole)[0], RunResult)
    assert two_ranks.run(train_rank, halves, MOMENT) == [None, None]
    assert read_verdict(halves) == "stopped"
    assert json.loads((halves / "stopped.json").read_text())["step"] == MOMENT
    resumed = two_ranks.run(train_rank, halves)

    assert read_verdict(halves) == "complete"
    assert not (halves / "stopped.json").exists()
    assert losses(halves) == losses(whole)
    assert sorted(losses(whole)) == list(range(1, 2 * MOMENT + 1))
    assert resumed[0] == resumed[1] == read_result(halves)
    assert resumed[0].attempts == 2
    assert resumed[0].per_position_loss == read_result(whole).per_position_loss
    hashes = [{f.name: f.sha256 for f in manifest_of(d).files} for d in (whole, halves)]
    assert hashes[0] == hashes[1]


def test_result_and_events_hold_what_was_measured(two_ranks: RankPool, runs: Runs) -> None:
    run_dir = runs.make("run", every_step("gpt", 1))
    result = two_ranks.run(train_rank, run_dir)[0]

    assert losses(run_dir)[1] == pytest.approx(4.11, abs=0.1)
    assert losses(run_dir)[NUM_STEPS] < losses(run_dir)[1] - 0.4
    assert result.steps == NUM_STEPS
    assert result.tokens == NUM_STEPS * GLOBAL_BATCH_SAMPLES * SEQUENCE_TOKENS
    assert len(result.per_position_loss) == SEQUENCE_TOKENS
    assert [len(result.model_state_bytes), result.world_size, result.zero_stage] == [2, 2, 1]
    for name in ("perf/tokens_per_second", "perf/step_seconds", "perf/slowest_rank_ratio"):
        assert result.metrics[name].num == NUM_STEPS - 3
        assert result.metrics[name].spread is not None
    assert result.metrics["memory/peak_bytes"].value > 50_000_000
    assert result.metrics["eval/loss"].num == 409
    assert "perf/mfu_fraction" not in result.metrics
    parts = {k: v for k, v in result.goodput.items() if k != "wall_seconds"}
    assert sum(parts.values()) == pytest.approx(result.goodput["wall_seconds"], rel=0.01)

    kinds = [(e.kind, e.step) for e in lineage(run_dir) if e.kind != "train"]
    assert kinds == [
        ("start", 0), ("eval", 5), ("eval", 10), ("checkpoint", 12), ("eval", 12), ("finish", 12)
    ]  # fmt: skip
    last = [e for e in lineage(run_dir) if e.kind == "train"][-1].metrics
    assert last["progress/tokens"] == result.tokens
    assert 0.0 < last["perf/forward_seconds"] < last["perf/step_seconds"]
    assert last["train/bits_per_byte"] > 0.0
    assert len(list(run_dir.glob("events.*.jsonl"))) == 1


def test_training_and_evaluation_count_the_same_bits_of_the_same_text(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    # One step over all samples of a text, hardly a move of the weights, and the same text to score.
    num_tokens = GLOBAL_BATCH_SAMPLES * SEQUENCE_TOKENS + 1
    prepared_dir = write_prepared(tmp_path / "prepared", num_tokens, num_tokens)
    shutil.copy(prepared_dir / "train-00000.bin", prepared_dir / "validation-00000.bin")
    train = {"total_tokens": num_tokens - 1, "optimizer": {"learning_rate": 1e-12}}
    run_dir = write_run_dir(tmp_path / "run", prepared_dir, small_run("gpt", 1, train=train))
    result = two_ranks.run(train_rank, run_dir)[0]
    step = next(e for e in lineage(run_dir) if e.kind == "train").metrics
    for name in ("loss", "bits_per_byte"):
        expected = result.metrics[f"eval/{name}"].value
        assert step[f"train/{name}"] == pytest.approx(expected, rel=1e-6), name


def test_diverging_run_ends_with_its_steps_skipped_and_no_result(
    two_ranks: RankPool, runs: Runs
) -> None:
    # The first update throws the weights so far that the next loss overflows.
    run = every_step("gpt", 1, guard={"max_nonfinite_steps": 3}, checkpoint={"every_steps": 1})
    wild = run.train.optimizer.model_copy(update={"learning_rate": 1e30})
    train_config = run.train.model_copy(update={"optimizer": wild})
    run_dir = runs.make("run", run.model_copy(update={"train": train_config}))
    errors = two_ranks.run(train_rank, run_dir)
    assert all(isinstance(e, TrainingDiverged) for e in errors)
    assert str(errors[0]) == str(errors[1])
    skipped = [e.step for e in read_events(run_dir / "events.jsonl") if e.kind == "skip"]
    assert skipped == [2, 3, 4]
    assert read_verdict(run_dir) is None
    assert manifest_of(run_dir).skipped_in_a_row == 2


def test_stop_file_stops_all_ranks_with_a_checkpoint(two_ranks: RankPool, runs: Runs) -> None:
    run_dir = runs.make("run", every_step("gpt", 2))
    (run_dir / "stop.request").touch()
    assert two_ranks.run(train_rank, run_dir) == [None, None]
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert stopped["reason"] == "request"
    # Who asked has to see afterwards that he did.
    assert (run_dir / "stop.request").exists()
    assert manifest_of(run_dir).step == stopped["step"] == 0


def send_signal_and_train(ranks: RankContext, run_dir: Path, marker: Path) -> Any:
    """Let rank 1 alone be asked to stop, as DeepSpeed's launcher asks ranks one by one."""
    if ranks.rank == 1:
        # The handler stands once the group trains, so the signal comes from another process.
        script = f"while [ ! -s {marker} ]; do sleep 0.01; done; kill -TERM {os.getpid()}"
        child = os.posix_spawn("/bin/sh", ["sh", "-c", script], dict(os.environ))
        result = train_rank(ranks, run_dir)
        os.waitpid(child, 0)
        return result
    return train_rank(ranks, run_dir)


def test_signal_to_one_rank_stops_all_at_one_step(two_ranks: RankPool, runs: Runs) -> None:
    run = every_step("gpt", 1)
    long = run.train.model_copy(update={"total_tokens": 4000 * run.train.global_batch_tokens})
    run_dir = runs.make("run", run.model_copy(update={"train": long}))
    results = two_ranks.run(send_signal_and_train, run_dir, run_dir / "events.jsonl")
    assert results == [None, None]
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert stopped["reason"] == "signal"
    assert manifest_of(run_dir).step == stopped["step"] == max(losses(run_dir))


def signal_in_evaluation(ranks: RankContext, run_dir: Path, step: int) -> Any:
    """Signal rank 1 once the step before an evaluation is logged, which no other step follows."""
    if ranks.rank == 0:
        return train_rank(ranks, run_dir)
    script = (
        f'cd {run_dir}; until grep -qs \'"kind":"train","step":{step},\' events.jsonl; '
        "do sleep 0.01; done; touch in-time; "
        f"kill -TERM {os.getpid()}"
    )
    child = os.posix_spawn("/bin/sh", ["sh", "-c", script], dict(os.environ))
    trained = train_rank(ranks, run_dir)
    os.waitpid(child, 0)
    return trained


@pytest.fixture(scope="module")
def long_evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("long") / "prepared"
    return write_prepared(directory, validation_tokens=16_000)


@pytest.mark.parametrize("step", [5, NUM_STEPS], ids=["midway", "final"])
def test_signal_in_an_evaluation_stops_it_and_the_next_start_makes_up_for_it(
    two_ranks: RankPool, long_evaluation: Path, tmp_path: Path, step: int
) -> None:
    every = 5 if step == 5 else None
    run = every_step("gpt", 1, eval={"every_steps": every})
    run_dir = write_run_dir(tmp_path / "run", long_evaluation, run)
    assert two_ranks.run(signal_in_evaluation, run_dir, step) == [None, None]
    assert (run_dir / "in-time").exists()
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert stopped == {"schema_version": 1, "step": step, "reason": "signal"}
    assert manifest_of(run_dir).step == step
    assert not [e for e in lineage(run_dir) if e.kind == "eval"]

    result = two_ranks.run(train_rank, run_dir)[0]
    assert result == read_result(run_dir)
    scored = [e.step for e in lineage(run_dir) if e.kind == "eval"]
    assert scored == ([5, 10, NUM_STEPS] if step == 5 else [NUM_STEPS])
    assert sorted(losses(run_dir)) == list(range(1, NUM_STEPS + 1))


@pytest.mark.parametrize("stop_after_steps", [3, None], ids=["stopped", "finished"])
def test_directory_of_another_config_is_refused(
    two_ranks: RankPool, runs: Runs, stop_after_steps: int | None
) -> None:
    run_dir = runs.make("run", every_step("gpt", 1))
    two_ranks.run(train_rank, run_dir, stop_after_steps)
    text = (run_dir / "run.yaml").read_text()
    (run_dir / "run.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    errors = two_ranks.run(train_rank, run_dir)
    assert all(isinstance(e, ConfigError) and "another config" in str(e) for e in errors)


def test_rank_without_shards_names_the_command_to_run(one_rank: RankPool, runs: Runs) -> None:
    run = every_step("gpt", 0)
    unnamed = runs.make("unnamed", run)
    tree = (unnamed / "run.yaml").read_text().replace(str(runs.prepared_dir), "/nowhere")
    (unnamed / "run.yaml").write_text(tree)
    error = one_rank.run(train_rank, unnamed)[0]
    assert isinstance(error, DataError)
    assert "python -m launch prepare" in str(error)


def test_global_batch_that_does_not_divide_over_the_ranks_is_refused(
    two_ranks: RankPool, runs: Runs
) -> None:
    train = {"global_batch_tokens": 3 * 2 * 16, "total_tokens": 96, "micro_batch_samples": 2}
    run_dir = runs.make("run", small_run("gpt", 0, train=train))
    errors = two_ranks.run(train_rank, run_dir)
    assert all(isinstance(e, ConfigError) and "world(2)" in str(e) for e in errors)


@pytest.mark.parametrize("family", ["gpt", "lstm_attention"])
def test_resumed_run_drops_the_same_as_the_uninterrupted_one(
    two_ranks: RankPool, runs: Runs, family: str
) -> None:
    dropped, plain = (short(family, 1, model={"dropout": share}) for share in (0.1, 0.0))
    whole, halves = runs.make("whole", dropped), runs.make("halves", dropped)
    two_ranks.run(train_rank, whole)
    two_ranks.run(train_rank, halves, MOMENT)
    two_ranks.run(train_rank, halves)
    assert losses(halves) == losses(whole)
    without = runs.make("without", plain)
    two_ranks.run(train_rank, without, 1)
    assert losses(without)[1] != pytest.approx(losses(whole)[1], rel=1e-4)
