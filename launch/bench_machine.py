"""From this machine to a cluster file with its measured hardware, by ranks that run the probe."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.display import Display
    from pipeline.config.cluster import ClusterConfig

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
"""Where Linux says what caches a core has, a directory `indexN` each."""

SECONDS_PER_POINT = 0.3
"""How long each of about forty points is measured, alone and together: a minute in all."""


def check_request(
    machine: Path | None, config: Path | None, cluster_file: Path | None, workers: int | None
) -> "ClusterConfig":
    """Give the ranks to measure with: as many as there are cores, unless stated.

    Raises:
        ConfigError: A run is named as well, no file is, or the ranks would be on other machines.
    """
    from pipeline.config.load import load_cluster
    from pipeline.errors import ConfigError

    if machine is None:
        raise ConfigError("bench measures a run or, with --machine FILE.yaml, this machine")
    if config is not None:
        raise ConfigError(
            f"--machine measures the machine and no run; leave {config} out, or leave out --machine"
        )
    cluster = load_cluster(cluster_file, [] if workers is None else [f"num_workers={workers}"])
    if cluster.launcher != "local" or cluster.accelerator == "cuda":
        raise ConfigError(
            f"--machine measures the cores of this machine, not launcher={cluster.launcher}, "
            f"accelerator={cluster.accelerator}; for GPUs state data sheets, as in "
            "configs/cluster/h100-8.yaml"
        )
    if "num_workers" not in cluster.model_fields_set:
        cores = len(os.sched_getaffinity(0))
        workers = max(1, cores // cluster.threads_per_worker)
        cluster = cluster.model_copy(update={"num_workers": workers})
    return cluster.model_copy(update={"accelerator": "cpu"})


def measure(
    cluster: "ClusterConfig",
    machine: Path,
    display: "Display",
    seconds_per_point: float = SECONDS_PER_POINT,
) -> dict[str, Any]:
    """Measure one rank alone and all at the same time, and write the cluster file.

    Args:
        cluster: Ranks and threads.
        machine: The file; what stands there is replaced.
        display: Shows what happens.
        seconds_per_point: How long each point of a curve is measured; five calls at least.

    Returns:
        What the file states.

    Raises:
        ConfigError: This machine does not tell the size of its caches.
        LaunchError: A rank failed.
    """
    import yaml

    from launch import build_launcher
    from launch.display import WatchedLauncher
    from launch.machine_file import Host, cluster_tree, file_text
    from launch.stopping import StopRequest
    from pipeline.config.cluster import ClusterConfig
    from pipeline.errors import LaunchError
    from pipeline.tracking.atomic import write_text_atomic
    from pipeline.tracking.store import PROBE_FILE, read_probe_result

    cache_bytes = last_cache_bytes()
    stop = StopRequest(display.say)
    starter = WatchedLauncher(launcher=build_launcher(cluster, stop), display=display)
    with TemporaryDirectory(prefix="tandem-machine-") as directory, stop.listening():
        run_dir = Path(directory)
        params = {"seconds_per_point": seconds_per_point}
        tree = {"probe": "machine", "params": params, "runs": {}}
        write_text_atomic(run_dir / PROBE_FILE, yaml.safe_dump(tree))
        if starter.run(run_dir, num_workers=cluster.num_workers) == "stopped":
            raise LaunchError("the measurement was stopped, so no file was written")
        result = read_probe_result(run_dir)
    environment = result.environment
    host = Host(
        device=environment.get("cpu_model", "CPU"),
        memory_bytes=environment["memory_bytes"],
        cache_bytes=cache_bytes,
        num_ranks=cluster.num_workers,
        threads_per_rank=cluster.threads_per_worker,
    )
    found = cluster_tree(result.records, host)
    ClusterConfig.model_validate(found)
    day = result.ended.date().isoformat()
    origin = f"Measured on {day} by `bench --machine`: one rank alone, {host.num_ranks} together."
    write_text_atomic(machine, file_text(found, origin))
    return found


def last_cache_bytes(caches: Path = CACHES) -> int:
    """Give the size of the largest cache of a core.

    Raises:
        ConfigError: The machine does not tell.
    """
    from pipeline.errors import ConfigError

    units = {"K": 2**10, "M": 2**20}
    sizes = [path.read_text().strip() for path in caches.glob("index*/size")]
    if not sizes:
        raise ConfigError(
            f"{caches} does not tell the size of this machine's caches; write the cluster file by "
            "hand, as in configs/cluster/cpu-2-cores.yaml, with cache_bytes from lscpu"
        )
    return max(int(size.rstrip("KM")) * units.get(size[-1], 1) for size in sizes)
