"""A run whose data holds a stretch that the model cannot foresee: skipped, or gone around."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.schema import RunConfig
from pipeline.errors import TrainingDiverged
from pipeline.tracking.events import read_events
from pipeline.tracking.store import RunResult, read_result
from pipeline.training.checkpoint_files import list_checkpoints, write_manifest
from pipeline.training.checkpoint_store import LocalStore
from tests.training.cases import (
    GLOBAL_BATCH_SAMPLES,
    SEQUENCE_TOKENS,
    VOCAB_SIZE,
    small_run,
    write_prepared,
    write_run,
)
from tests.training.rank_pool import RankPool
from tests.training.runs import lineage, losses, manifest_of, train_rank

pytestmark = pytest.mark.slow

WINDOW = 32
"""Steps that spikes are judged by; a quarter of the default, so that a run is short."""
NUM_STEPS = 26
SPIKE = 20
"""The step whose samples are spoilt; the window has been half full since step 16."""


@pytest.fixture(scope="module")
def spoilt_dir(tmp_path_factory: pytest.TempPathFactory, two_ranks: RankPool) -> Path:
    """Shards in which all samples of one step of the stream are ids in falling order."""
    directory = write_prepared(tmp_path_factory.mktemp("spoilt") / "prepared", train_tokens=20_000)
    run_dir = write_run(directory.parent / "probe", directory, spiky_run(0))
    samples = np.concatenate(two_ranks.run(samples_of_step, run_dir, SPIKE)).ravel()
    assert len(set(samples.tolist())) == GLOBAL_BATCH_SAMPLES
    path = directory / "train-00000.bin"
    tokens = np.fromfile(path, dtype="<u2")
    for sample in samples:
        first = sample * SEQUENCE_TOKENS + 1
        tokens[first : first + SEQUENCE_TOKENS - 1] = np.arange(SEQUENCE_TOKENS - 1, 0, -1) * 3
    assert tokens.max() < VOCAB_SIZE
    path.write_bytes(tokens.tobytes())
    return directory


def spiky_run(stage: int, policy: str = "off", **fields: Any) -> RunConfig:
    batch_tokens = GLOBAL_BATCH_SAMPLES * SEQUENCE_TOKENS
    train = {"total_tokens": NUM_STEPS * batch_tokens, "optimizer": {"learning_rate": 1e-2}}
    guard = {"spike": policy, "spike_window_steps": WINDOW}
    shared = {"guard": guard, "eval": {"every_steps": None}, "tracking": {"log_every_steps": 1}}
    fields = shared | fields
    return small_run("gpt", stage, train=train, **fields)


def samples_of_step(ranks: Any, run_dir: Path, step: int) -> Any:
    """Give this rank's samples of a step, as the loader of the run orders them."""
    from pipeline.config.batching import plan_batches
    from pipeline.config.load import read_run
    from pipeline.data.loader import TokenLoader
    from pipeline.training.train import load_prepared

    run = read_run(run_dir)
    manifest = load_prepared(run, run_dir)
    plan = plan_batches(run.train, ranks.world_size)
    loader = TokenLoader(manifest, run.data.mixture, plan, ranks.rank, run.seed)
    batches = [loader.next_step() for _ in range(step)][-1]
    return np.concatenate([batch.sample_ids for batch in batches])


@pytest.mark.parametrize("stage", [0, 3])
def test_spike_is_skipped_alone_and_stays_out_of_the_window(
    two_ranks: RankPool, spoilt_dir: Path, tmp_path: Path, stage: int
) -> None:
    run_dir = write_run(tmp_path / "run", spoilt_dir, spiky_run(stage, "skip"))
    results = two_ranks.run(train_rank, run_dir)
    assert isinstance(results[0], RunResult)
    assert results[0] == results[1]
    skips = [e for e in read_events(run_dir / "events.jsonl") if e.kind == "skip"]
    assert [e.step for e in skips] == [SPIKE]
    assert "is a spike" in skips[0].values["reason"]
    assert skips[0].values["first_sample"] == (SPIKE - 1) * GLOBAL_BATCH_SAMPLES
    assert (results[0].skipped_steps, results[0].rewinds) == (1, 0)
    assert results[0].goodput["skipped_seconds"] > 0.0
    curve = losses(run_dir)
    assert curve[SPIKE] > 2.0 * curve[SPIKE - 1]
    window = manifest_of(run_dir).guard
    assert window["losses"] == [curve[step] for step in curve if step != SPIKE]
    assert window["num_spikes"] == 1
    assert manifest_of(run_dir).optimizer_step == NUM_STEPS - 1


def test_rewound_run_equals_one_that_was_led_around_the_spike(
    two_ranks: RankPool, spoilt_dir: Path, tmp_path: Path
) -> None:
    guard = {"spike": "rewind", "spike_window_steps": WINDOW, "rewind_skip_steps": 30}
    run = spiky_run(1, guard=guard, checkpoint={"every_steps": 9})
    rewound = write_run(tmp_path / "rewound", spoilt_dir, run)
    result = two_ranks.run(train_rank, rewound)[0]
    assert (result.rewinds, result.skipped_steps, result.attempts) == (1, 1, 2)

    resume = next(e for e in read_events(rewound / "events.jsonl") if e.kind == "resume")
    assert resume.step == 18
    told = resume.values["rewind"]
    assert (told["from_step"], told["first_sample"]) == (SPIKE, 18 * GLOBAL_BATCH_SAMPLES)
    assert told["num_samples"] == 30 * GLOBAL_BATCH_SAMPLES
    kept = [e.step for e in lineage(rewound) if e.kind == "train"]
    assert kept == list(range(1, NUM_STEPS + 1))
    assert result.goodput["lost_seconds"] > 0.0
    assert_sums_to_wall(result)

    # The same by hand: stopped at the checkpoint, and its place in the stream moved on.
    led = write_run(tmp_path / "led", spoilt_dir, run)
    two_ranks.run(train_rank, led, 18)
    manifest = manifest_of(led)
    moved = manifest.samples + 30 * GLOBAL_BATCH_SAMPLES
    write_manifest(
        LocalStore(led / "checkpoints"),
        list_checkpoints(led)[0].name,
        manifest.model_copy(update={"samples": moved}),
    )
    two_ranks.run(train_rank, led)
    assert losses(led) == losses(rewound)
    assert read_result(led).per_position_loss == result.per_position_loss


def test_every_rank_raises_where_the_policy_says_so(
    two_ranks: RankPool, spoilt_dir: Path, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path / "run", spoilt_dir, spiky_run(1, "raise"))
    errors = two_ranks.run(train_rank, run_dir)
    assert all(isinstance(e, TrainingDiverged) for e in errors)
    assert str(errors[0]) == str(errors[1])
    assert f"step {SPIKE} is a spike" in str(errors[0])
    abort = read_events(run_dir / "events.jsonl")[-1]
    assert (abort.kind, abort.step) == ("abort", SPIKE)
    assert "is a spike" in abort.values["error"]


def test_clean_run_of_hundreds_of_steps_is_never_stopped(
    one_rank: RankPool, tmp_path: Path
) -> None:
    prepared_dir = write_prepared(tmp_path / "prepared", train_tokens=20_000)
    # Nobody reads an event of each step here.
    run = spiky_run(1, guard={"spike": "raise"}, tracking={"log_every_steps": 100})
    long = run.train.model_copy(update={"total_tokens": 250 * run.train.global_batch_tokens})
    run_dir = write_run(tmp_path / "run", prepared_dir, run.model_copy(update={"train": long}))
    result = one_rank.run(train_rank, run_dir)[0]
    assert (result.steps, result.skipped_steps) == (250, 0)
    assert len(manifest_of(run_dir).guard["losses"]) == 128


def assert_sums_to_wall(result: RunResult) -> None:
    parts = {k: v for k, v in result.goodput.items() if k != "wall_seconds"}
    assert sum(parts.values()) == pytest.approx(result.goodput["wall_seconds"], rel=0.01)
