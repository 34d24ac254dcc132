"""Arguments and options that verbs share, and how `cluster.` overrides find their config."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.environment import check_output_is_stated, is_inside_ray_job

if TYPE_CHECKING:
    from pipeline.config.cluster import ClusterConfig
    from pipeline.config.schema import RunConfig

EXIT_STOPPED = 75
"""Stopped on request with a checkpoint; EX_TEMPFAIL of sysexits.h: the same command goes on."""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="A.B=C", help="Fields to set over the config.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would run; start nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Answer with JSON on standard output.")]
ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", metavar="FILE", help="Cluster config: where to run.")
]
LauncherName = Annotated[
    str | None, typer.Option("--launcher", metavar="local|ray|hostfile", help="Who starts ranks.")
]
NumWorkers = Annotated[
    int | None, typer.Option("--workers", metavar="N", help="Number of ranks (world size).")
]


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """A run and the cluster it is to run on."""

    run: "RunConfig"
    cluster: "ClusterConfig"


def load_request(
    config: Path,
    overrides: Sequence[str] | None,
    *,
    cluster_file: Path | None = None,
    launcher: str | None = None,
    num_workers: int | None = None,
) -> RunRequest:
    """Load a run and its cluster; overrides that start with `cluster.` go to the cluster.

    Args:
        config: A run YAML, or a run directory that was made before.
        overrides: `a.b=c` strings.
        cluster_file: A cluster YAML; None takes the defaults.
        launcher: Over the cluster's launcher.
        num_workers: Over the cluster's world size.

    Raises:
        ConfigError: A config is wrong, or a Ray job does not say where results go.
    """
    from pipeline.config.load import load_cluster, load_run

    given = list(overrides or [])
    path = config / "run.yaml" if config.is_dir() else config
    for_run = [override for override in given if not override.startswith("cluster.")]
    check_output_is_stated(states_output(path, for_run))
    for_cluster = [
        override.removeprefix("cluster.") for override in given if override not in for_run
    ]
    for_cluster += [f"launcher={launcher}"] if launcher is not None else []
    for_cluster += [f"num_workers={num_workers}"] if num_workers is not None else []
    cluster = load_cluster(cluster_file, for_cluster)
    return RunRequest(run=load_run(path, for_run), cluster=for_ray_job(cluster))


def for_ray_job(cluster: "ClusterConfig") -> "ClusterConfig":
    """Give the cluster with Ray as launcher where a Ray job names none."""
    if is_inside_ray_job() and "launcher" not in cluster.model_fields_set:
        return cluster.model_copy(update={"launcher": "ray"})
    return cluster


def states_output(path: Path, overrides: Sequence[str]) -> bool:
    """Tell whether a config file, an override or the environment says where results go.

    Raises:
        ConfigError: The file cannot be read.
    """
    from pipeline.config.load import read_yaml

    if os.environ.get("TANDEM_OUTPUT"):
        return True
    if any(override.startswith("output_dir=") for override in overrides):
        return True
    return read_yaml(path).get("output_dir") is not None


def as_tree(config: Any) -> dict[str, Any]:
    """Give a config as plain values for a JSON answer."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    return tree
