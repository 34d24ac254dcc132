"""Traces of named steps, from real ranks to the store that shows them."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.load import load_run
from pipeline.tracking.mlflow_client import connected, default_uri
from pipeline.tracking.mlflow_sync import sync
from pipeline.training.distributed import RankContext
from pipeline.training.profiling import StepProfiler
from tests.training.rank_pool import RankPool
from tests.training.runs import NUM_STEPS, Runs, every_step, lineage, losses, train_rank


def test_steps_are_named_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {family: gpt}")
    run = load_run(path, ["profile.steps=10..12"])
    assert run.profile.first_and_last == (10, 12)


def read_trace(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return events


@pytest.mark.slow
def test_each_rank_traces_the_named_steps_and_mlflow_shows_them(
    two_ranks: RankPool, runs: Runs, migrated_store: Path
) -> None:
    run_dir = runs.make("run", every_step("gpt", 1, profile={"steps": "5..6"}))
    shutil.copy(migrated_store, run_dir.parent)
    plain = runs.make("plain", every_step("gpt", 1))
    result = two_ranks.run(train_rank, run_dir)[0]
    two_ranks.run(train_rank, plain)

    assert losses(run_dir) == losses(plain)
    names = [f"trace-steps-5-6-rank-{rank}.json.gz" for rank in range(2)]
    assert sorted(path.name for path in (run_dir / "profile").iterdir()) == names
    for name in names:
        events = read_trace(run_dir / "profile" / name)
        starts = [e for e in events if "Optimizer.step" in e["name"]]
        # One call for weights that decay and one for those that do not.
        assert len(starts) == 2 * 2
        assert any("allreduce" in e["name"] for e in events)

    # Steps 4 and 7 to 12: neither warm-up nor traced.
    assert result.metrics["perf/step_seconds"].num == NUM_STEPS - 3 - 2
    steps = [event for event in lineage(run_dir) if event.kind == "train"]
    timed = [event.step for event in steps if "perf/step_seconds" in event.values]
    assert timed == [1, 2, 3, 4, *range(7, NUM_STEPS + 1)]

    uri = default_uri(run_dir.parent)
    sync(run_dir, uri)
    with connected(uri, print) as client:
        experiments = [e.experiment_id for e in client.search_experiments()]
        shown = client.search_runs(experiments, filter_string="tags.role = 'training'")
        assert len(shown) == 1
        artifacts = client.list_artifacts(shown[0].info.run_id, "profile")
    assert [Path(artifact.path).name for artifact in artifacts] == names


def test_each_part_of_a_run_names_the_steps_that_it_traced(tmp_path: Path) -> None:
    ranks = RankContext(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu")
    )
    for part in (range(1, 4), range(4, 8), range(8, 9)):
        with StepProfiler(tmp_path, (2, 6), ranks) as profiler:
            for step in part:
                profiler.begin(step)
                profiler.end(step)
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["trace-steps-2-3-rank-0.json.gz", "trace-steps-4-6-rank-0.json.gz"]


@pytest.mark.slow
def test_a_run_that_stops_between_the_steps_leaves_a_trace_of_each_part(
    one_rank: RankPool, runs: Runs
) -> None:
    run_dir = runs.make("run", every_step("gpt", 0, profile={"steps": "2..6"}))
    one_rank.run(train_rank, run_dir, 3)
    one_rank.run(train_rank, run_dir, 7)
    one_rank.run(train_rank, run_dir)
    first, second = sorted((run_dir / "profile").iterdir())
    assert first.name == "trace-steps-2-3-rank-0.json.gz"
    assert second.name == "trace-steps-4-6-rank-0.json.gz"
    assert num_optimizer_calls(first) == 2
    assert num_optimizer_calls(second) == 3


def num_optimizer_calls(path: Path) -> int:
    return sum("Optimizer.step" in event["name"] for event in read_trace(path))


def num_recorded_allocations() -> int:
    snapshot = torch.cuda.memory._snapshot()
    return sum(map(len, snapshot["device_traces"]))


@pytest.mark.gpu
@pytest.mark.parametrize("step", [1, 5])
def test_memory_is_recorded_only_where_steps_lie_ahead(tmp_path: Path, step: int) -> None:
    """The run is resumed before the steps, and behind them; it stops before any is traced."""
    ranks = RankContext(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cuda", 0)
    )
    before = num_recorded_allocations()
    with StepProfiler(tmp_path, (3, 4), ranks) as profiler:
        profiler.begin(step)
        torch.ones(1000, device="cuda").sum()
        assert (num_recorded_allocations() > before) == (step == 1)
        profiler.end(step)
    stopped = num_recorded_allocations()
    torch.ones(1000, device="cuda").sum()
    assert num_recorded_allocations() <= stopped
    assert not (tmp_path / "profile").exists()


@pytest.mark.gpu
def test_a_snapshot_tells_of_traced_steps_and_of_memory_that_ran_out(tmp_path: Path) -> None:
    ranks = RankContext(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cuda", 0)
    )
    with StepProfiler(tmp_path, (1, 1), ranks) as profiler:
        profiler.begin(1)
        torch.ones(1000, device="cuda").sum()
        profiler.end(1)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**46, dtype=torch.uint8, device="cuda")
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == [
        "memory-out-of-memory-rank-0.pickle",
        "memory-steps-1-1-rank-0.pickle",
        "trace-steps-1-1-rank-0.json.gz",
    ]
