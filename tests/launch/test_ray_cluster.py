"""Ranks as Ray Train workers: on what device, and what each reserves."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from launch.ray_cluster import Move
from launch.ray_nodes import (
    Node,
    Room,
    build_look,
    choose_accelerator,
    files_to_see,
    legal_sizes,
    worker_resources,
)
from launch.stopping import STOP_FILE, StopRequest
from pipeline.config.load import dump_yaml, load_cluster, load_run
from pipeline.errors import ConfigError, LaunchError

BATCH_384 = "train.global_batch_tokens=384"


def test_a_rank_takes_a_cpu_or_its_share_of_too_few() -> None:
    assert worker_resources("cpu", {"CPU": 4.0}, 4) == {"CPU": 1.0}
    assert worker_resources("cpu", {"CPU": 2.0}, 3) == {"CPU": 0.66}
    assert worker_resources("cuda", {"CPU": 8.0, "GPU": 2.0}, 2) == {"CPU": 1.0, "GPU": 1.0}


def test_a_cluster_without_cpus_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(LaunchError, match="no node of the Ray cluster offers a CPU"):
        worker_resources("cpu", {}, 2)


def test_the_device_is_what_the_cluster_offers() -> None:
    assert choose_accelerator("auto", {"CPU": 2.0}, 2) == "cpu"
    assert choose_accelerator("auto", {"GPU": 2.0}, 2) == "cuda"
    assert choose_accelerator("cpu", {"GPU": 2.0}, 2) == "cpu"
    with pytest.raises(LaunchError, match=r"num_workers=1 or cluster\.accelerator=cpu"):
        choose_accelerator("auto", {"GPU": 1.0}, 2)
    with pytest.raises(LaunchError, match="the Ray cluster has 0"):
        choose_accelerator("cuda", {"CPU": 2.0}, 2)


def test_a_node_holds_as_many_ranks_as_its_scarcest_resource_allows() -> None:
    node = Node(node_id="a", host="a", resources={"CPU": 8.0, "GPU": 2.0})
    assert node.room({"CPU": 1.0}) == 8
    assert node.room({"CPU": 1.0, "GPU": 1.0}) == 2
    assert node.room({"CPU": 1.0, "TPU": 1.0}) == 0
    # 3 x 0.66 is below 2, though 2 / 0.66 may fall short of a whole number.
    assert Node(node_id="a", host="a", resources={"CPU": 2.0}).room({"CPU": 0.66}) == 3


def write_run(run_dir: Path, tiny_run: Path, *overrides: str) -> None:
    (run_dir / "run.yaml").write_text(dump_yaml(load_run(tiny_run, overrides)))


def test_an_elastic_run_takes_only_sizes_over_which_its_batch_divides(
    tmp_path: Path, tiny_run: Path
) -> None:
    write_run(tmp_path, tiny_run, BATCH_384)
    run_dir = tmp_path
    # 384 tokens = micro-batches of 2 x 32 tokens, 6 of them.
    assert legal_sizes(run_dir, 1, 6, "cpu") == [1, 2, 3, 6]
    assert legal_sizes(run_dir, 4, 4, "cpu") == [4]
    with pytest.raises(ConfigError, match="not a multiple"):
        legal_sizes(run_dir, 1, 4, "cpu")


def test_the_smallest_size_is_at_most_the_largest() -> None:
    with pytest.raises(ConfigError, match=r"min_workers=3 is above num_workers=2"):
        load_cluster(None, ["num_workers=2", "min_workers=3"])


def room_for(run_dir: Path, sizes: list[int]) -> Room:
    return Room(
        run_dir=run_dir, sizes=sizes, needs={"CPU": 1.0}, accelerator="cpu", wait_seconds=0.5
    )


def test_ray_train_starts_no_process_that_no_run_needs(tmp_path: Path) -> None:
    from launch.ray_trainer import UNUSED, RankTrainer, build_trainer

    trainer = build_trainer(room_for(tmp_path, [2]), load_cluster(None, []), 2, None)
    ours = {type(one).__name__ for one in trainer._create_default_callbacks()}
    rays = {type(one).__name__ for one in super(RankTrainer, trainer)._create_default_callbacks()}
    assert rays - ours == set(UNUSED), "Ray Train has renamed them"
    assert "BackendSetupCallback" in ours


def test_a_process_that_only_starts_ranks_under_ray_loads_no_torch() -> None:
    code = "import sys, launch.ray_trainer; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_request_of_an_attempt_that_was_lost_does_not_stop_the_next(tmp_path: Path) -> None:
    move = Move(room_for(tmp_path, [1, 2]), 1, StopRequest(print))
    with move.alone_asking():
        (tmp_path / STOP_FILE).touch()
    assert (tmp_path / STOP_FILE).exists(), "a request that somebody else made was dropped"
    move.is_asked = True
    with suppress(LaunchError), move.alone_asking():
        raise LaunchError("a rank was lost")
    assert not (tmp_path / STOP_FILE).exists()


def test_what_ranks_need_to_see_is_named(tmp_path: Path, tiny_run: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_run(tmp_path, tiny_run, f"data.prepared_dir={shards}")
    wanted, missing_here = files_to_see(tmp_path), build_look()
    assert missing_here(wanted) == [f"the shards {shards}"]
    (shards / "manifest.json").touch()
    assert missing_here(wanted) == []
    (tmp_path / "run.yaml").rename(tmp_path / "elsewhere.yaml")
    assert missing_here(wanted) == [f"the run directory {tmp_path}"]
