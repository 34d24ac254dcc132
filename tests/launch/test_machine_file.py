"""Curves of machines whose figures are known, and what a cluster file states of them."""

from pathlib import Path
from typing import Any

import pytest

from launch.bench_machine import check_request, last_cache_bytes
from launch.machine_file import Host, cluster_tree, file_text, fit_line, fit_link
from pipeline.config.load import load_cluster
from pipeline.errors import ConfigError
from pipeline.estimate.step_time import UPDATE_BYTES, VALUE_PASSES
from tests.launch.conftest import Cli

RATE, START = 8e10, 4e-6
HOST = Host(device="Made", memory_bytes=2**34, cache_bytes=2**25, num_ranks=2, threads_per_rank=1)
LATENCY, BANDWIDTH = 1e-4, 1e9


def point(curve: str, shape: tuple[int, ...], work: float, seconds: float) -> dict[str, Any]:
    return {
        "curve": curve, "shape": list(shape), "work": work, "seconds": seconds,
        "crowded_seconds": seconds / 0.8,
    }  # fmt: skip


def links(num_ranks: int) -> list[dict[str, Any]]:
    """A ring of known latency and bandwidth, of which gathers reach a quarter."""
    found = []
    for num_bytes in (8, 2**18, 2**22):
        for curve, rounds, share in (
            ("all_reduce", 2, 1.0), ("all_gather", 1, 0.25), ("reduce_scatter", 1, 1.0),
        ):  # fmt: skip
            moved = rounds * (num_ranks - 1) / num_ranks * num_bytes
            seconds = rounds * (num_ranks - 1) * LATENCY + moved / (share * BANDWIDTH)
            found.append(point(curve, (num_bytes, num_ranks), num_bytes, seconds))
    return found


def machine() -> list[dict[str, Any]]:
    """1e10 bytes a second, of which operations between products reach half."""
    products = [
        point("products", (n, n, n), 2.0 * n**3, START + 2.0 * n**3 / RATE) for n in (8, 64, 512)
    ]
    # Steps of a tiny layer take 3 us each; the larger layer's have as fast products as others.
    tokens, width = 100, 64
    rows = 2 * tokens
    others = 4 * (START + 2.0 * rows * width * 4 * width / RATE)
    between = VALUE_PASSES["fp32"] * 16.5 * width * rows * 4 / 5e9
    flops = 2 * 2.0 * 2 * width * 4 * width * tokens
    whole = others + between + 2 * tokens * 3e-6 + flops / (RATE / 4)
    return [
        *products,
        point("copy", (2**20,), 2.0**21, 2.0**21 / 1e10),
        point("values", (512, 256), 2.0**20, 2.0**20 * VALUE_PASSES["fp32"] / 5e9),
        point("update", (10**6,), 1e6, 1e6 * UPDATE_BYTES["cpu"] / 8e9),
        point("attention", (1, 1, 64, 64), 1e6, 1e6 / 2e10),
        point("recurrence", (1, 8, 100), 0.0, 2 * 100 * 3e-6),
        point("recurrence", (2, width, tokens), flops, whole),
        *links(2),
    ]  # fmt: skip


def test_a_line_through_exact_points_is_found() -> None:
    line = fit_line([r for r in machine() if r["curve"] == "products"])
    assert line.rate == pytest.approx(RATE)
    assert line.start_seconds == pytest.approx(START)


def test_a_curve_that_would_start_before_zero_starts_at_zero() -> None:
    """Large calls that are slower than small ones have no start."""
    line = fit_line([point("products", (1,), 1e6, 1e-5), point("products", (2,), 1e9, 2e-2)])
    assert line.start_seconds == 0.0
    assert 5e10 < line.rate < 1e11


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_latency_and_bandwidth_of_a_ring_come_back(num_ranks: int) -> None:
    curves: dict[str, list[Any]] = {}
    for record in links(num_ranks):
        curves.setdefault(record["curve"], []).append(record)
    link = fit_link(curves, num_ranks)
    assert link["latency_seconds"] == pytest.approx(LATENCY, rel=1e-3)
    assert link["bytes_per_second"] == pytest.approx(BANDWIDTH, rel=0.01)
    assert link["fraction_by_operation"]["all_gather"] == pytest.approx(0.25, rel=0.01)


def test_a_measured_machine_becomes_a_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(file_text(cluster_tree(machine(), HOST), "Measured"))
    cluster = load_cluster(path)
    hardware = cluster.hardware
    assert hardware is not None
    assert (cluster.num_workers, hardware.devices_per_node) == (2, 2)
    reached = hardware.peak_flops_per_second["fp32"] * hardware.product_fraction
    assert reached == pytest.approx(RATE, rel=0.01)
    assert hardware.memory_bytes_per_second == pytest.approx(1e10, rel=0.01)
    assert hardware.memory_fraction == pytest.approx(0.5, rel=0.01)
    assert hardware.update_bytes_per_second == pytest.approx(8e9, rel=0.01)
    assert hardware.recurrent_step_seconds == pytest.approx(3e-6, rel=0.01)
    assert hardware.crowded_fraction == pytest.approx(0.8)
    assert hardware.recurrent_fraction is not None
    recurrent = hardware.peak_flops_per_second["fp32"] * hardware.recurrent_fraction
    assert recurrent == pytest.approx(RATE / 4, rel=0.02)
    assert path.read_text().startswith("# Measured\n")


def test_a_curve_that_is_missing_is_named() -> None:
    records = [record for record in machine() if record["curve"] != "all_gather"]
    with pytest.raises(ConfigError, match="lacks the curves all_gather"):
        cluster_tree(records, HOST)


def test_the_last_cache_is_the_largest(tmp_path: Path) -> None:
    for index, size in enumerate(("32K", "512K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_cache_bytes(tmp_path) == 32 * 2**20
    with pytest.raises(ConfigError, match="cache_bytes from lscpu"):
        last_cache_bytes(tmp_path / "none")


def test_bench_wants_a_run_or_a_machine_and_not_both(cli: Cli, tmp_path: Path) -> None:
    neither = cli("bench")
    assert (neither.code, "--machine FILE.yaml" in neither.err) == (2, True)
    both = cli("bench", tmp_path / "run.yaml", "--machine", tmp_path / "m.yaml")
    assert (both.code, "leave out --machine" in both.err) == (2, True)


def test_a_machine_is_measured_on_all_cores_unless_ranks_are_stated(tmp_path: Path) -> None:
    import os

    path = tmp_path / "m.yaml"
    cores = len(os.sched_getaffinity(0))
    assert check_request(path, None, None, None).num_workers == cores
    assert check_request(path, None, None, 3).num_workers == 3
    cluster = tmp_path / "ray.yaml"
    cluster.write_text("launcher: ray\n")
    with pytest.raises(ConfigError, match="not launcher=ray"):
        check_request(path, None, cluster, None)
