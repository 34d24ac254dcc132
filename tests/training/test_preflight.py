"""Ranks that would not train the same thing never start."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import LaunchError
from pipeline.tracking.events import read_events
from pipeline.training.distributed import RankContext
from pipeline.training.preflight import check_same_on_all_ranks, collect_facts, list_differences
from tests.training.cases import small_run
from tests.training.rank_pool import RankPool
from tests.training.runs import Runs, every_step, train_rank


def train_in_own_directory(ranks: RankContext, run_dirs: list[Path], steps: int) -> Any:
    return train_rank(ranks, run_dirs[ranks.rank], steps)


def other_host(run_dir: Path, old: str, new: str) -> Path:
    """The directory as a host with another run.yaml sees it; what ranks write is shared."""
    there = run_dir.with_name("there")
    there.mkdir()
    text = (run_dir / "run.yaml").read_text()
    assert old in text
    (there / "run.yaml").write_text(text.replace(old, new))
    (run_dir / "checkpoints").mkdir()
    (there / "checkpoints").symlink_to(run_dir / "checkpoints")
    return there


@pytest.mark.slow
def test_rank_of_another_config_is_named_with_its_value(two_ranks: RankPool, runs: Runs) -> None:
    here = runs.make("here", every_step("gpt", 1))
    there = other_host(here, "learning_rate: 0.003", "learning_rate: 0.004")
    errors = two_ranks.run(train_in_own_directory, [here, there], 1)
    assert all(isinstance(error, LaunchError) for error in errors)
    assert str(errors[0]) == str(errors[1])
    told = str(errors[0])
    assert "config.train.optimizer.learning_rate: 0.003 (rank 0 on " in told
    assert "0.004 (rank 1 on " in told
    assert not (here / "events.jsonl").exists()


@pytest.mark.slow
def test_difference_that_is_allowed_is_recorded(two_ranks: RankPool, runs: Runs) -> None:
    here = runs.make("here", every_step("gpt", 1, guard={"allow_mismatch": True}))
    there = other_host(here, "beta2: 0.95", "beta2: 0.96")
    assert two_ranks.run(train_in_own_directory, [here, there], 1) == [None, None]
    start = read_events(here / "events.jsonl")[0]
    assert len(start.values["mismatches"]) == 1
    assert start.values["mismatches"][0].startswith("config.train.optimizer.beta2: 0.95 (rank 0")


def check_data(ranks: RankContext, fingerprints: list[str]) -> str:
    try:
        check_same_on_all_ranks(small_run("gpt"), fingerprints[ranks.rank], ranks)
    except LaunchError as exc:
        return str(exc)
    return "the same"


@pytest.mark.slow
def test_rank_of_other_data_is_named(two_ranks: RankPool) -> None:
    assert two_ranks.run(check_data, ["f" * 16, "f" * 16]) == ["the same", "the same"]
    told = two_ranks.run(check_data, ["f" * 16, "e" * 16])[1]
    assert "data.fingerprint: ffffffffffffffff (rank 0 on" in told
    assert "guard.allow_mismatch=true" in told


def test_facts_cover_config_code_packages_python_and_byte_order() -> None:
    facts = collect_facts(small_run("gpt"), "f" * 16)
    assert facts["config.train.sequence_tokens"] == "16"
    assert len(facts["code.training/loop.py"]) == 12
    assert facts["package.torch"].startswith("2.")
    assert {"python", "byte_order", "package.deepspeed", "package.numpy"} < facts.keys()
    assert "config.data.prepared_dir" not in facts


def test_many_ranks_of_one_value_are_shortened() -> None:
    facts = [{"python": "3.11.1"}] * 5 + [{}]
    (line,) = list_differences(facts, [f"host{rank}" for rank in range(6)])
    assert line == (
        "python: 3.11.1 (rank 0 on host0, rank 1 on host1, rank 2 on host2 and 2 more); "
        "absent (rank 5 on host5)"
    )
