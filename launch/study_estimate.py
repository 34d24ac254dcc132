"""From a study's cells and a cluster with hardware to what each will take, for a dry run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.display import format_seconds
from launch.estimate_page import GIB

if TYPE_CHECKING:
    from pipeline.config.cluster import ClusterConfig
    from pipeline.config.study import StudyConfig
    from pipeline.study.planned import Cell


def with_hardware(
    study: "StudyConfig", cluster_file: Path | None, *, is_dry_run: bool
) -> "StudyConfig":
    """Give the study with the hardware of a cluster file, to be estimated on it.

    Args:
        study: The study, which keeps its launcher and world sizes.
        cluster_file: Cluster with hardware; None leaves the study's own.
        is_dry_run: Whether nothing will be started.

    Raises:
        ConfigError: The file states no hardware, or the study is to run: where, it says itself.
    """
    from pipeline.config.load import load_cluster
    from pipeline.errors import ConfigError

    if cluster_file is None:
        return study
    if not is_dry_run:
        raise ConfigError(
            f"--cluster {cluster_file} is for --dry-run: a study runs on the machines that its own "
            "`cluster` names; write them there, or add --dry-run"
        )
    hardware = load_cluster(cluster_file).hardware
    if hardware is None:
        raise ConfigError(f"{cluster_file} states no hardware to estimate on")
    cluster = study.cluster.model_copy(update={"hardware": hardware})
    return study.model_copy(update={"cluster": cluster})


def estimate_cell(cell: "Cell", cluster: "ClusterConfig") -> dict[str, Any] | None:
    """Give what a training cell will take.

    Args:
        cell: The cell.
        cluster: The study's machines.

    Returns:
        Plain values; None for a probe, whose work has no closed form, and where the cluster states
        no hardware.

    Raises:
        ConfigError: A figure of the hardware is missing, or there are more ranks than devices.
    """
    from pipeline.estimate.forecast import forecast, machines_of, vocab_size_of
    from pipeline.study.planned import TrainCell

    machines = machines_of(cluster, cell.num_workers)
    if machines is None or not isinstance(cell, TrainCell):
        return None
    found = forecast(cell.run, vocab_size_of(cell.run), machines)
    return {
        "fits": found.fit.is_enough,
        "needed_bytes": found.fit.needed_bytes,
        "capacity_bytes": found.fit.capacity_bytes,
        "step_seconds": found.step.seconds,
        "tokens_per_second": found.step.tokens_per_second,
        "seconds": found.seconds,
        "cost": None if found.cost is None else found.cost.amount,
    }


def cell_lines(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in a line each what cells will take, and all together; nothing where none is estimated.

    Args:
        cells: Cells with their `name` and `estimate`.
    """
    known = {cell["name"]: cell["estimate"] for cell in cells if cell["estimate"] is not None}
    if not known:
        return []
    lines = []
    for name, found in known.items():
        verdict = "fits" if found["fits"] else "DOES NOT FIT"
        memory = f"{found['needed_bytes'] / GIB:.2f} of {found['capacity_bytes'] / GIB:.2f} GiB"
        lines.append(
            f"estimate: {name}: {verdict} ({memory}), ~ {found['tokens_per_second']:,.0f} "
            f"tokens/s, ~ {format_seconds(found['seconds'])}"
        )
    total = format_seconds(sum(found["seconds"] for found in known.values()))
    left_out = len(cells) - len(known)
    beside = f"; {left_out} probes are not estimated" if left_out else ""
    return [*lines, f"estimate: {len(known)} training runs, ~ {total} one after another{beside}"]
