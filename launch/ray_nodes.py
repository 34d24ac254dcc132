"""From a Ray cluster to the number of ranks it can hold: on nodes that answer and see the storage.

Ray's own view lags: a node whose cable is out counts as alive for another minute.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray._private.state
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launch.environment import Accelerator
from launch.run_dirs import shared_shards_of
from launch.stopping import StopRequest
from pipeline.config.cluster import ClusterConfig, check_run_on_cluster
from pipeline.config.load import RUN_FILE, read_run
from pipeline.errors import ConfigError, LaunchError

ANSWER_SECONDS = 30
"""How long a node may take to start a process and look: 2 s, more where its cores are busy. One
whose cable is out answers never, and Ray itself takes 65 s to notice."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that Ray believes to be alive."""

    node_id: str
    host: str
    resources: Mapping[str, float]

    def room(self, needs: Mapping[str, float]) -> int:
        """Give how many ranks with these needs it can hold."""
        # Ray counts in steps of 0.0001, so a quotient may fall short of a whole number by less.
        return int(min(self.resources.get(k, 0.0) / need + 1e-6 for k, need in needs.items()))


def leaving_node_ids() -> set[str]:
    """Give the nodes that are to go: preempted by the cloud, idle, or drained by hand."""
    # What Ray Train's own watcher asks; there is no public question.
    return set(ray._private.state.state.get_draining_nodes())


def nodes_with_room(needs: Mapping[str, float]) -> list[Node]:
    """Give the nodes that can hold a rank, that Ray believes to be alive and that are to stay."""
    leaving = leaving_node_ids()
    nodes = [
        Node(node_id=row["NodeID"], host=row["NodeManagerHostname"], resources=row["Resources"])
        for row in ray.nodes()
        if row["Alive"] and row["NodeID"] not in leaving
    ]
    return [node for node in nodes if node.room(needs) > 0]


def answering_nodes(nodes: Sequence[Node], run_dir: Path) -> list[Node]:
    """Give the nodes on which a process starts and sees what ranks need.

    The node of this process needs no question: it has written the run directory.

    Args:
        nodes: From `nodes_with_room`.
        run_dir: The run directory.

    Raises:
        LaunchError: A node answers, but does not see the run directory or the shards; all such
            nodes are named.
    """
    here = ray.get_runtime_context().get_node_id()
    answering = [node for node in nodes if node.node_id == here]
    wanted = files_to_see(run_dir)
    look = ray.remote(num_cpus=0, max_retries=0)(build_look())
    asked = {
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ).remote(wanted): node
        for node in nodes
        if node.node_id != here
    }
    lacking = []
    for reference in _done(list(asked)):
        try:
            missing = ray.get(reference)
        except ray.exceptions.RayError:
            continue
        answering.append(asked[reference])
        if missing:
            lacking.append(f"{asked[reference].host} does not see {', '.join(missing)}")
    if lacking:
        raise LaunchError(
            "nothing was started: every node needs the same storage under the same paths; mount it "
            "there, or choose another output_dir:\n  " + "\n  ".join(sorted(lacking))
        )
    return answering


def _done(references: list[Any]) -> list[Any]:
    """Give the references that are there in time, and cancel the others."""
    if not references:
        return []
    done, late = ray.wait(references, num_returns=len(references), timeout=ANSWER_SECONDS)
    for reference in late:
        ray.cancel(reference, force=True)
    return list(done)


def files_to_see(run_dir: Path) -> dict[str, str]:
    """Give what ranks of a run need to see: how to call it, and a file that proves it."""
    name = f"the run directory {run_dir}"
    if not (run_dir / RUN_FILE).is_file():
        return {name: str(run_dir / "probe.yaml")}
    wanted = {name: str(run_dir / RUN_FILE)}
    if (shards := shared_shards_of(run_dir)) is not None:
        wanted[f"the shards {shards}"] = str(shards / "manifest.json")
    if (branch := read_run(run_dir).branch) is not None:
        wanted[f"the run to begin in, {branch.run_dir}"] = str(branch.run_dir / RUN_FILE)
    return wanted


def build_look() -> Callable[[Mapping[str, str]], list[str]]:
    """Give a function that names those files which do not stand on the machine it runs on.

    It has no name in this module, so that Ray sends its code, and the process that starts on a node
    only for this question loads nothing of ours.
    """

    def missing_here(wanted: Mapping[str, str]) -> list[str]:
        return [name for name, path in wanted.items() if not Path(path).is_file()]

    return missing_here


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a run asks of the cluster, and what of it is there."""

    run_dir: Path
    sizes: list[int]
    """World sizes that the run may have, ascending."""
    needs: Mapping[str, float]
    """What a rank reserves, by Ray's names."""
    accelerator: Accelerator
    wait_seconds: float
    """How long to wait for nodes that can hold the run."""

    def believed_size(self) -> int:
        """Give the largest world size that fits on the nodes that Ray believes in; 0 for none."""
        return self._largest(nodes_with_room(self.needs))

    def size(self) -> int:
        """Give the largest world size that fits on nodes that answer; 0 where none does.

        Raises:
            LaunchError: As `answering_nodes`.
        """
        return self._largest(answering_nodes(nodes_with_room(self.needs), self.run_dir))

    def wait_for_size(self, stop: StopRequest) -> int:
        """Give `size`, once it is not 0; 0 where that takes too long or a stop is asked for.

        Args:
            stop: Whether the user has asked for a stop; told once that the run waits.

        Raises:
            LaunchError: As `size`.
        """
        deadline = time.monotonic() + self.wait_seconds
        is_told = False
        while (size := self.size()) == 0 and time.monotonic() < deadline and not stop.is_made:
            if not is_told:
                stop.on_event(f"waiting up to {self.wait_seconds:g} s: {self.describe_lack()}")
                is_told = True
            # Nodes that Ray believes in may not answer; they are asked again, not at once.
            time.sleep(1.0)
            while self.believed_size() == 0 and time.monotonic() < deadline and not stop.is_made:
                time.sleep(1.0)
        return size

    def describe_lack(self) -> str:
        """Say what is asked for, what is there, and what to do."""
        nodes = nodes_with_room(self.needs)
        there = ", ".join(f"{node.host} for {node.room(self.needs)}" for node in nodes) or "none"
        return (
            f"{self.run_dir.name} needs {self.sizes[0]} ranks with {dict(self.needs)} each; "
            f"the Ray cluster has nodes with room: {there}; those that do not answer hold none; "
            "add nodes, lower cluster.num_workers, give cluster.min_workers, or wait longer "
            "(cluster.wait_seconds)"
        )

    def _largest(self, nodes: Sequence[Node]) -> int:
        room = sum(node.room(self.needs) for node in nodes)
        return max((size for size in self.sizes if size <= room), default=0)


def find_room(cluster: ClusterConfig, run_dir: Path, num_workers: int) -> Room:
    """Settle what a run asks of the cluster it is connected to.

    Args:
        cluster: Smallest world size, accelerator, and how long to wait for nodes.
        run_dir: The run directory.
        num_workers: Largest world size.

    Raises:
        LaunchError: The cluster lacks GPUs, or has no CPU at all.
        ConfigError: The global batch does not divide over `num_workers`.
    """
    smallest = min(cluster.min_workers or num_workers, num_workers)
    resources = ray.cluster_resources()
    accelerator = choose_accelerator(cluster.accelerator, resources, smallest)
    return Room(
        run_dir=run_dir,
        sizes=legal_sizes(run_dir, smallest, num_workers, accelerator),
        needs=worker_resources(accelerator, resources, smallest),
        accelerator=accelerator,
        wait_seconds=cluster.wait_seconds,
    )


def legal_sizes(run_dir: Path, smallest: int, largest: int, accelerator: Accelerator) -> list[int]:
    """Give the world sizes of a range over which the global batch divides; a probe has but one.

    Raises:
        ConfigError: The run cannot be trained on `largest` ranks.
    """
    if smallest == largest or not (run_dir / RUN_FILE).is_file():
        return [largest]
    run = read_run(run_dir)
    check_run_on_cluster(run, largest, accelerator)
    sizes = []
    for size in range(smallest, largest + 1):
        with suppress(ConfigError):
            check_run_on_cluster(run, size, accelerator)
            sizes.append(size)
    return sizes


def choose_accelerator(
    choice: str, resources: Mapping[str, float], num_workers: int
) -> Accelerator:
    """Tell what the ranks compute on, from what the cluster offers.

    Args:
        choice: `cluster.accelerator`.
        resources: The cluster's total resources by Ray's names.
        num_workers: Smallest world size.

    Raises:
        LaunchError: CUDA is asked for, or partly there, and the GPUs are fewer than the ranks.
    """
    num_gpus = int(resources.get("GPU", 0))
    if choice == "cpu" or (choice == "auto" and num_gpus == 0):
        return "cpu"
    if num_gpus < num_workers:
        raise LaunchError(
            f"{num_workers} ranks need a GPU each, the Ray cluster has {num_gpus}; "
            f"use cluster.num_workers={max(1, num_gpus)} or cluster.accelerator=cpu"
        )
    return "cuda"


def worker_resources(
    accelerator: Accelerator, resources: Mapping[str, float], num_workers: int
) -> dict[str, float]:
    """Give what each worker reserves: one CPU, or an equal part where CPUs are fewer than ranks.

    Raises:
        LaunchError: No node of the cluster offers a CPU; Ray would wait for ever.
    """
    num_cpus = resources.get("CPU", 0.0)
    if num_cpus <= 0:
        raise LaunchError("no node of the Ray cluster offers a CPU; add a worker node")
    # Ray counts resources in steps of 0.0001; rounding down keeps the sum within the cluster.
    share = 1.0 if num_cpus >= num_workers else int(num_cpus / num_workers * 100) / 100
    return {"CPU": max(share, 0.01), **({"GPU": 1.0} if accelerator == "cuda" else {})}
