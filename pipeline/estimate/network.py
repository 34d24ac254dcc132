"""From a collective and the links between ranks to its seconds, by a latency-bandwidth model.

A ring sends one share of the tensor per hop; a tree goes up and down once. Hops inside a host and
between hosts have their own latency, and the slowest link bounds the bandwidth: a host's adapters
together carry one ring, so it enters and leaves each host once.

Source: Thakur, Rabenseifner and Gropp 2005, section 4 (costs of ring and tree); NCCL,
src/graph/tuning.cc (hops inside and between hosts, base latency, bandwidth of a tree).
"""

import math
from dataclasses import dataclass

from pipeline.config.hardware import HardwareConfig, Link
from pipeline.errors import ConfigError
from pipeline.estimate.collectives import Collective, Op

BASE_SECONDS = {"cuda": 8.4e-6, "cpu": 0.0}
"""What a collective takes before its first hop. Source: NCCL src/graph/tuning.cc, baseLatencies,
ring and tree, protocol Simple; on a CPU the link's latency holds it."""

TREE_FRACTION = 0.92
"""Bandwidth of a tree over that of a ring. Source: NCCL src/graph/tuning.cc, all-reduce by tree."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How the ranks of a collective lie on hosts, and the links that they use."""

    num_ranks: int
    num_nodes: int
    kind: str
    """cpu or cuda."""
    links: tuple[Link, ...]
    """Those that a ring crosses."""
    intra_seconds: float
    """One hop inside a host."""
    inter_seconds: float
    """One hop between hosts."""

    def bytes_per_second(self, op: Op) -> float:
        """Give what one direction of a ring carries: the slowest link bounds it."""
        return min(
            (link.bytes_per_second * link.fraction_of(op) for link in self.links), default=math.inf
        )


def lay_out(hardware: HardwareConfig, num_ranks: int, ranks_per_node: int) -> Topology:
    """Put ranks on hosts, filling each before the next.

    Args:
        hardware: Links.
        num_ranks: Ranks that take part.
        ranks_per_node: Ranks of a full host.

    Raises:
        ConfigError: Ranks need a link that the hardware does not state.
    """
    num_nodes = math.ceil(num_ranks / ranks_per_node)
    needed: list[Link] = []
    if min(num_ranks, ranks_per_node) > 1:
        needed.append(_stated(hardware.intra_node, "intra_node", num_ranks))
    if num_nodes > 1:
        needed.append(_stated(hardware.inter_node, "inter_node", num_ranks))
    intra = hardware.intra_node.latency_seconds if hardware.intra_node else 0.0
    inter = hardware.inter_node.latency_seconds if hardware.inter_node else 0.0
    return Topology(
        num_ranks=num_ranks,
        num_nodes=num_nodes,
        kind=hardware.kind,
        links=tuple(needed),
        intra_seconds=intra,
        inter_seconds=inter,
    )


def collective_seconds(op: Op, num_bytes: float, topology: Topology) -> float:
    """Give the seconds of one collective; an all-reduce takes the faster of ring and tree.

    Args:
        op: The collective.
        num_bytes: Of the whole tensor.
        topology: The ranks that take part.
    """
    if topology.num_ranks <= 1:
        return 0.0
    ring = _ring_seconds(op, num_bytes, topology)
    if op != "all_reduce":
        return ring
    return min(ring, _tree_seconds(num_bytes, topology))


def total_seconds(collective: Collective, topology: Topology) -> float:
    """Give the seconds of all calls of a collective in a step, averaged over the steps."""
    once = collective_seconds(collective.op, collective.bytes, topology)
    return once * collective.times / collective.every_steps


def _ring_seconds(op: Op, num_bytes: float, topology: Topology) -> float:
    rounds = 2 if op == "all_reduce" else 1
    num_hops = rounds * (topology.num_ranks - 1)
    between = rounds * (topology.num_nodes - 1)
    latency = (num_hops - between) * topology.intra_seconds + between * topology.inter_seconds
    moved = rounds * (topology.num_ranks - 1) / topology.num_ranks * num_bytes
    return BASE_SECONDS[topology.kind] + latency + moved / topology.bytes_per_second(op)


def _tree_seconds(num_bytes: float, topology: Topology) -> float:
    ranks_of_host = math.ceil(topology.num_ranks / topology.num_nodes)
    depth = math.ceil(math.log2(topology.num_nodes))
    latency = (ranks_of_host - 1) * topology.intra_seconds + depth * topology.inter_seconds
    bandwidth = TREE_FRACTION * topology.bytes_per_second("all_reduce")
    return BASE_SECONDS[topology.kind] + 2 * latency + 2 * num_bytes / bandwidth


def _stated(link: Link | None, name: str, num_ranks: int) -> Link:
    if link is None:
        raise ConfigError(
            f"hardware.{name} is missing, and {num_ranks} ranks send over it; state its "
            "bytes_per_second (one direction, data sheet) and latency_seconds (a benchmark such as "
            "nccl-tests)"
        )
    return link
