"""What a process of ours may assume about its surroundings: device, rank variables, Ray job."""

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Literal

from pipeline.errors import ConfigError

Accelerator = Literal["cpu", "cuda"]

LAUNCHER_PORT = 29500
"""Where the first rank listens when ranks are started by hand over several hosts."""


def detect_accelerator(choice: Literal["auto", "cpu", "cuda"] = "auto") -> Accelerator:
    """Tell what ranks on this machine compute on, without loading torch.

    `auto` takes CUDA where an NVIDIA device is present and visible; whether it works is checked by
    the ranks, which refuse a device that is present but unusable.

    Args:
        choice: `cluster.accelerator`.
    """
    if choice != "auto":
        return choice
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return "cpu"
    return "cuda" if nvidia_devices() else "cpu"


def expected_accelerator(
    launcher: str, choice: Literal["auto", "cpu", "cuda"]
) -> Accelerator | None:
    """Tell what ranks will compute on, as far as this machine can know before they start.

    Args:
        launcher: `cluster.launcher`.
        choice: `cluster.accelerator`.

    Returns:
        None where the ranks run on other machines and take what is there; they check it themselves.
    """
    return None if launcher != "local" and choice == "auto" else detect_accelerator(choice)


def nvidia_devices() -> list[str]:
    """Give the NVIDIA devices of this machine: device files, else what nvidia-smi lists."""
    files = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    if files or shutil.which("nvidia-smi") is None:
        return files
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in listed.stdout.splitlines() if line.startswith("GPU")]


def base_environment(accelerator: Accelerator, threads: int) -> dict[str, str]:
    """Give the variables that every rank needs before torch is loaded, whoever starts it.

    Args:
        accelerator: What the ranks compute on.
        threads: CPU threads of one rank.
    """
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if accelerator == "cpu" else {}
    return {
        **hidden,
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": accelerator,
        # torch's availability check would otherwise start CUDA in a process that is forked later.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # A compile that was killed leaves a lock in the shared cache, on which every start hangs.
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR") or _private_extensions_dir(),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Give the variables that tell a rank of a single machine where its peers are.

    Args:
        rank: 0 to world_size - 1.
        world_size: Number of ranks, all on this machine.
        port: A free port on loopback, where rank 0 listens.
    """
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if Path("/sys/class/net/lo").exists():
        # gloo otherwise looks up the host's name, which fails or is slow where no DNS knows it.
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return environment


def free_port() -> int:
    """Give a TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_inside_ray_job() -> bool:
    """Tell whether this process is the entrypoint of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_output_is_stated(is_stated: bool) -> None:
    """Refuse a Ray job whose results would vanish with its working directory.

    Args:
        is_stated: Whether the config or an override names `output_dir`.

    Raises:
        ConfigError: Neither `output_dir` nor TANDEM_OUTPUT is given inside a Ray job.
    """
    if is_inside_ray_job() and not is_stated and not os.environ.get("TANDEM_OUTPUT"):
        raise ConfigError(
            "a Ray job's working directory vanishes with the job: state where results go with "
            "output_dir=/shared/runs, or set TANDEM_OUTPUT on the cluster"
        )


def _private_extensions_dir() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(cache) / "tandem" / "torch_extensions")
