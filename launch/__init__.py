"""From a config to running ranks: the command line, the launchers and what one rank runs."""

from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.config.cluster import ClusterConfig

if TYPE_CHECKING:
    from launch.stopping import StopRequest
    from pipeline.study.execute import Launcher

LAUNCHERS = {
    "local": "launch.local:LocalLauncher",
    "ray": "launch.ray_cluster:RayLauncher",
    "hostfile": "launch.hostfile:HostfileLauncher",
}
"""Name in `cluster.launcher` to the class that starts the ranks; each is built from the cluster."""


def build_launcher(cluster: ClusterConfig, stop: "StopRequest") -> "Launcher":
    """Build the launcher that a cluster config names.

    Args:
        cluster: Names the launcher and what it needs.
        stop: The command's request to stop, which the launcher passes on to its ranks.

    Raises:
        ConfigError: The cluster lacks what this launcher needs.
    """
    module, _, name = LAUNCHERS[cluster.launcher].partition(":")
    launcher: Launcher = getattr(import_module(module), name)(cluster, stop)
    return launcher
