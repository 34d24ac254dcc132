"""Ranks as Ray Train workers: on what device, and what each reserves."""

import pytest

from launch.ray_cluster import choose_accelerator, worker_resources
from pipeline.errors import LaunchError


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
