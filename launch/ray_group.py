"""From Ray Train workers to ranks that find each other, as the other launchers' ranks do.

Ray's own `TorchConfig` makes the process group before the ranks begin, for which the launching
process and the controller of every attempt load torch: 3 s of each start and each restart. Here
they load none, and the ranks join their group themselves.
"""

import os
import socket
from typing import Any

import ray.train
import ray.util
from ray.train.backend import Backend, BackendConfig


class GroupBackend(Backend):  # type: ignore[misc]
    """Tells workers who they are and where rank 0 is, by torch's usual variables."""

    share_cuda_visible_devices = True
    """A rank takes the GPU of its number among those of its node, as under the other launchers."""

    def on_training_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Set the variables in every worker."""
        place = worker_group.execute_single(0, place_of_rank_0)
        worker_group.execute(take_rank, place)


class GroupConfig(BackendConfig):  # type: ignore[misc]
    """Chooses `GroupBackend`."""

    @property
    def backend_cls(self) -> type[GroupBackend]:
        """The class whose methods the controller calls."""
        return GroupBackend


def place_of_rank_0() -> dict[str, str]:
    """Give this host's address, and a port of it that nobody listens on now."""
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return {"MASTER_ADDR": address, "MASTER_PORT": str(probe.getsockname()[1])}


def take_rank(place: dict[str, str]) -> None:
    """Set what torch and DeepSpeed read about this worker among the others."""
    context = ray.train.get_context()
    numbers = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
    }
    os.environ.update(place | {name: str(number) for name, number in numbers.items()})
