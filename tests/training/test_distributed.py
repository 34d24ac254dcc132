import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.config.load import read_run
from pipeline.tracking.store import RunResult
from pipeline.training.distributed import (
    RankContext,
    barrier,
    gather_json,
    start_distributed,
    stop_distributed,
    sum_over_ranks,
)
from pipeline.training.train import train
from tests.training.cases import small_run, write_prepared, write_run
from tests.training.rank_pool import RankPool, call_in_process, free_port, rank_environment

pytestmark = pytest.mark.slow


def describe_group() -> tuple[RankContext, str, list[float], bool]:
    ranks = start_distributed()
    backend = dist.get_backend()
    sums = sum_over_ranks([1.5, 2.0], ranks)
    stop_distributed(ranks)
    return ranks, backend, sums, dist.is_initialized()


def test_single_process_without_a_launcher_is_a_group_of_its_own() -> None:
    ranks, backend, sums, is_left = call_in_process(describe_group, {})
    assert (ranks.rank, ranks.world_size, ranks.local_world_size) == (0, 1, 1)
    assert ranks.owns_group
    assert backend == "gloo"
    assert sums == [1.5, 2.0]
    assert not is_left


def test_half_an_environment_is_an_error_that_names_what_is_missing() -> None:
    message = call_in_process(describe_group, {"RANK": "0", "WORLD_SIZE": "2"})
    assert message.startswith("LaunchError")
    assert "MASTER_ADDR, MASTER_PORT" in message


def join_existing_group(ranks: RankContext) -> tuple[bool, bool]:
    again = start_distributed()
    stop_distributed(again)
    return again.owns_group, dist.is_initialized()


def test_group_that_exists_is_used_and_left_alone(two_ranks: RankPool) -> None:
    assert two_ranks.run(join_existing_group) == [(False, True)] * 2


def test_rank_whose_peer_never_comes_gives_up_after_the_timeout() -> None:
    environment = rank_environment(0, 2, free_port())
    environment["TANDEM_PROCESS_GROUP_TIMEOUT_SECONDS"] = "1.5"
    begin = time.monotonic()
    message = call_in_process(describe_group, environment)
    assert time.monotonic() - begin < 30.0
    assert message.startswith("LaunchError: rank 0 of 2 found no group at 127.0.0.1:")


def talk(ranks: RankContext) -> tuple[list[Any], list[float]]:
    barrier(ranks)
    value = {"rank": ranks.rank, "text": "ü" * (1 + 50 * ranks.rank), "none": None}
    return gather_json(value, ranks), sum_over_ranks([float(ranks.rank), 1.0], ranks)


def test_collectives_give_every_rank_the_same(two_ranks: RankPool) -> None:
    replies = two_ranks.run(talk)
    assert replies[0] == replies[1]
    values, sums = replies[0]
    assert values == [{"rank": r, "text": "ü" * (1 + 50 * r), "none": None} for r in range(2)]
    assert sums == [1.0, 2.0]


def train_alone(run_dir: Path) -> tuple[RunResult | None, list[str]]:
    result = train(run_dir)
    return result, sorted(os.listdir(run_dir))


def test_process_without_a_launcher_trains_a_run(tmp_path: Path) -> None:
    prepared_dir = write_prepared(tmp_path / "data")
    run_dir = write_run(tmp_path / "run", prepared_dir, small_run("lstm_attention", 1))
    result, files = call_in_process(train_alone, {"DS_ACCELERATOR": "cpu"}, run_dir)
    assert isinstance(result, RunResult), result
    assert result.steps == read_run(run_dir).train.total_steps
    assert {"checkpoints", "environment.json", "events.jsonl", "result.json"} <= set(files)
