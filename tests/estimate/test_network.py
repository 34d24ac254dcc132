"""Collectives by a latency-bandwidth model, against numbers worked by hand."""

import math

import pytest

from pipeline.config.hardware import HardwareConfig, Link
from pipeline.errors import ConfigError
from pipeline.estimate.network import BASE_SECONDS, TREE_FRACTION, collective_seconds, lay_out
from tests.estimate.published import hardware_of

GIGA = 1e9
BASE = BASE_SECONDS["cuda"]


def machine(**update: object) -> HardwareConfig:
    """8 GPUs a host, 100 GB/s inside, 50 GB/s a host between, of which all is reached."""
    links = {
        "intra_node": {"bytes_per_second": 100 * GIGA, "latency_seconds": 1e-6, "fraction": 1.0},
        "inter_node": {"bytes_per_second": 50 * GIGA, "latency_seconds": 1e-5, "fraction": 1.0},
    }
    tree = hardware_of("h100-64", 64).model_dump()
    return HardwareConfig.model_validate({**tree, **links, **update})


def test_one_rank_sends_nothing() -> None:
    assert collective_seconds("all_reduce", GIGA, lay_out(machine(), 1, 8)) == 0.0


def test_a_ring_inside_a_host_moves_its_share_of_the_tensor_per_hop() -> None:
    """7 hops of 1 us, and 7/8 of 1 GB at 100 GB/s."""
    topology = lay_out(machine(), 8, 8)
    expected = BASE + 7e-6 + 7 / 8 * 0.01
    assert collective_seconds("all_gather", GIGA, topology) == pytest.approx(expected)
    assert collective_seconds("reduce_scatter", GIGA, topology) == pytest.approx(expected)


def test_an_all_reduce_of_a_large_tensor_is_two_rings() -> None:
    expected = BASE + 14e-6 + 2 * 7 / 8 * 0.01
    assert collective_seconds("all_reduce", GIGA, lay_out(machine(), 8, 8)) == pytest.approx(
        expected
    )


def test_between_hosts_the_slowest_link_bounds_a_ring_and_hops_cost_more() -> None:
    """16 hosts of 8: 15 hops of 10 us, 112 of 1 us, 127/128 of 1 GB at 50 GB/s."""
    topology = lay_out(machine(num_nodes=16), 128, 8)
    expected = BASE + 15e-5 + 112e-6 + 127 / 128 * 0.02
    assert collective_seconds("all_gather", GIGA, topology) == pytest.approx(expected)


def test_a_small_all_reduce_over_many_hosts_goes_by_a_tree() -> None:
    """128 hosts: 7 hops inside and log2(128) between, up and down."""
    topology = lay_out(machine(num_nodes=128), 1024, 8)
    latency = 2 * (7e-6 + math.log2(128) * 1e-5)
    expected = BASE + latency + 2 * 8 / (TREE_FRACTION * 50 * GIGA)
    assert collective_seconds("all_reduce", 8, topology) == pytest.approx(expected)
    ring = BASE + 2 * (896 * 1e-6 + 127 * 1e-5)
    assert collective_seconds("all_reduce", 8, topology) < ring / 5


def test_protocols_take_their_share_of_a_link() -> None:
    """nccl-tests issue 212: 370 of NVLink's 450 GB/s, for anything but NVLink SHARP."""
    topology = lay_out(hardware_of("h100-8", 8), 8, 8)
    assert topology.bytes_per_second("all_reduce") == pytest.approx(370 * GIGA, rel=0.05)


def test_an_operation_that_was_measured_has_its_own_share_of_a_link() -> None:
    """A quarter of 100 GB/s for gathers, all of it for the rest."""
    link = machine().intra_node
    assert link is not None
    slow = link.model_copy(update={"fraction_by_operation": {"all_gather": 0.25}})
    topology = lay_out(machine(intra_node=slow.model_dump()), 8, 8)
    gathered = BASE + 7e-6 + 7 / 8 * 0.04
    assert collective_seconds("all_gather", GIGA, topology) == pytest.approx(gathered)
    scattered = BASE + 7e-6 + 7 / 8 * 0.01
    assert collective_seconds("reduce_scatter", GIGA, topology) == pytest.approx(scattered)


def test_a_link_that_is_needed_and_not_stated_is_named() -> None:
    alone = hardware_of("gpu-24gb", 1)
    with pytest.raises(ConfigError, match="hardware.intra_node is missing, and 2 ranks"):
        lay_out(alone, 2, 2)


def test_a_link_without_a_figure_says_where_to_look() -> None:
    with pytest.raises(ValueError, match="latency_seconds .* nccl-tests"):
        Link.model_validate({"bytes_per_second": 1e9})
