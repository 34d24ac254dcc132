"""From a launcher's environment to one process group, and the few collectives of training."""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import LaunchError
from pipeline.training.device import resolve_device

TIMEOUT_VARIABLE = "TANDEM_PROCESS_GROUP_TIMEOUT_SECONDS"
DEFAULT_TIMEOUT_SECONDS = 600.0
"""A lost rank is noticed after this time at most; a large model's first step may take minutes."""


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """This process among all ranks."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this host."""
    local_world_size: int
    """Number of ranks on this host."""
    device: torch.device
    """Where this rank computes."""
    owns_group: bool = False
    """Whether `start_distributed` made the process group, so that `stop_distributed` may end it."""


def start_distributed(accelerator: str = "auto") -> RankContext:
    """Join the process group that the environment describes, or the one that exists already.

    A test harness makes the group before; `deepspeed`, torchrun and our launchers only set RANK,
    WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without any of them
    this is a single process with a group of its own on loopback.

    Args:
        accelerator: auto, cpu or cuda, as `resolve_device`; auto first takes what DS_ACCELERATOR
            names, which launchers set and DeepSpeed obeys.

    Raises:
        LaunchError: The environment is incomplete, the other ranks do not come, or an NVIDIA device
            is there but unusable.
    """
    if accelerator == "auto":
        accelerator = os.environ.get("DS_ACCELERATOR", "auto")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = resolve_device(accelerator, local_rank)
    owns_group = not dist.is_initialized()
    if owns_group:
        _init_group("nccl" if device.type == "cuda" else "gloo", device)
    # DeepSpeed reads these two and not all launchers set them.
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    local_world_size = int(
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size()
    )
    os.environ.setdefault("LOCAL_SIZE", str(local_world_size))
    return RankContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        local_world_size=local_world_size,
        device=device,
        owns_group=owns_group,
    )


def stop_distributed(ranks: RankContext) -> None:
    """End the process group if `start_distributed` made it."""
    if ranks.owns_group and dist.is_initialized():
        dist.destroy_process_group()


def _init_group(backend: str, device: torch.device) -> None:
    timeout = timedelta(
        seconds=float(os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT_SECONDS)))
    )
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in os.environ]
    if given and len(given) < len(names):
        missing = sorted(set(names) - set(given))
        raise LaunchError(f"{', '.join(given)} are set but not {', '.join(missing)}")
    place: dict[str, Any] = (
        {}
        if given
        else {"init_method": f"tcp://127.0.0.1:{_free_port()}", "rank": 0, "world_size": 1}
    )
    bound = device if device.type == "cuda" else None
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=bound, **place)
    except dist.DistError as exc:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LaunchError(
            f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')} found no "
            f"group at {where} within {timeout.total_seconds():g} s ({TIMEOUT_VARIABLE}): {exc}"
        ) from exc


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sum_over_ranks(values: Sequence[float], ranks: RankContext) -> list[float]:
    """Sum numbers over all ranks in float64; every rank gets the sums.

    A single rank asks no other: even alone, a collective hands over to a thread of its own, which
    on a busy machine waits for a processor twice in every step.
    """
    if ranks.world_size == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def sum_tensor_over_ranks(values: torch.Tensor, ranks: RankContext) -> torch.Tensor:
    """Sum a tensor over all ranks; gives the sum on the CPU."""
    total = values.to(ranks.device)
    dist.all_reduce(total)
    return total.cpu()


def gather_json(value: Any, ranks: RankContext) -> list[Any]:
    """Give every rank the JSON value of each rank, in rank order.

    Bytes travel as tensors: object collectives would unpickle what another host sent. A single
    rank asks no other, as in `sum_over_ranks`.
    """
    if ranks.world_size == 1:
        return [json.loads(json.dumps(value))]
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = torch.zeros(ranks.world_size, dtype=torch.int64, device=ranks.device)
    lengths[ranks.rank] = payload.numel()
    dist.all_reduce(lengths)
    padded = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=ranks.device)
    padded[: payload.numel()] = payload.to(ranks.device)
    parts = [torch.empty_like(padded) for _ in range(ranks.world_size)]
    dist.all_gather(parts, padded)
    sizes = lengths.tolist()
    return [
        json.loads(bytes(part[:size].cpu().numpy()))
        for part, size in zip(parts, sizes, strict=True)
    ]


def barrier(ranks: RankContext) -> None:
    """Wait until every rank is here."""
    sum_over_ranks([0.0], ranks)
