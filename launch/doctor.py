"""From this machine to a list of findings: what is there, whether it will do, and what to do."""

import importlib.metadata
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from launch.environment import nvidia_devices

Verdict = Literal["ok", "warn", "fail"]
DISTRIBUTION = "tandem-pretraining"
SHOWN_PACKAGES = ("torch", "deepspeed", "ray", "mlflow")
GIB = 1 << 30
LEAST_MEMORY_GIB = 4.0
"""Two ranks with torch and DeepSpeed take about 1.5 GiB, a local Ray 1 GiB, MLflow 0.5 GiB."""
LEAST_DISK_GIB = 5.0
LEAST_SHARED_GIB = 0.3
"""Ray's object store stands in /dev/shm; a local Ray of this project takes 0.2 GiB."""
PROGRAMS = {
    "chromium": ("chromium", "only the tests of the report's page need it"),
    "pdsh": ("pdsh", "`deepspeed --hostfile` over ssh needs it; --no_ssh does not"),
}
PORTS = {5000: "MLflow's pages (ui --port chooses another)", 29500: "ranks of `deepspeed`"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything that this project needs; changes nothing."""
    return [
        _python(),
        *_packages(),
        _device(),
        _cores(),
        _memory(),
        _free_space("disk", Path.cwd(), LEAST_DISK_GIB, "runs need room for checkpoints"),
        _free_space("/dev/shm", Path("/dev/shm"), LEAST_SHARED_GIB, "Ray keeps objects there"),
        _temporary_directory(),
        *_ports(),
        *_programs(),
    ]


def _python() -> Finding:
    return Finding(name="python", verdict="ok", found=f"{sys.version.split()[0]} {sys.executable}")


def _packages() -> Iterator[Finding]:
    """Compare installed versions with the ranges that the project states; nothing is imported."""
    ranges = _stated_ranges()
    for name in SHOWN_PACKAGES:
        wanted = ranges.get(name)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                name=name, verdict="fail", found="not installed", advice="pip install -e ."
            )
            continue
        if wanted is not None and not wanted.specifier.contains(version, prereleases=True):
            yield Finding(
                name=name, verdict="fail", found=version, advice=f"pip install '{wanted}'"
            )
        else:
            yield Finding(name=name, verdict="ok", found=version)


def _stated_ranges() -> dict[str, Requirement]:
    try:
        stated = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in stated]
    return {item.name: item for item in requirements if item.marker is None}


def _device() -> Finding:
    devices = nvidia_devices()
    if not devices:
        return Finding(name="device", verdict="ok", found="CPU; no NVIDIA device is present")
    import torch

    driver = Path("/proc/driver/nvidia/version")
    shown = driver.read_text().splitlines()[0] if driver.exists() else "driver unknown"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        return Finding(name="device", verdict="ok", found=f"{len(devices)} x {name}, {shown}")
    return Finding(
        name="device",
        verdict="fail",
        found=f"{len(devices)} NVIDIA devices, {shown}, unusable by torch {torch.__version__}",
        advice="install the torch wheel that matches the driver, or set CUDA_VISIBLE_DEVICES=-1",
    )


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if count is not None and count < 2:
        advice = "two ranks share one core: correct, and slow"
        return Finding(name="cores", verdict="warn", found=str(count), advice=advice)
    return Finding(name="cores", verdict="ok", found=str(count))


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}"
    if memory.available / GIB < LEAST_MEMORY_GIB:
        advice = f"the quickstart wants {LEAST_MEMORY_GIB:g} GiB free"
        return Finding(name="memory", verdict="warn", found=found, advice=advice)
    return Finding(name="memory", verdict="ok", found=found)


def _free_space(name: str, path: Path, least_gib: float, reason: str) -> Finding:
    if not path.is_dir():
        return Finding(name=name, verdict="warn", found="absent", advice=reason)
    free = shutil.disk_usage(path).free / GIB
    if free < least_gib:
        advice = f"{reason}: at least {least_gib:g} GiB"
        return Finding(name=name, verdict="warn", found=f"{free:.1f} GiB free", advice=advice)
    return Finding(name=name, verdict="ok", found=f"{free:.1f} GiB free")


def _temporary_directory() -> Finding:
    path = tempfile.gettempdir()
    if not os.access(path, os.W_OK):
        return Finding(name="temporary", verdict="fail", found=path, advice="set TMPDIR")
    return Finding(name="temporary", verdict="ok", found=path)


def _ports() -> Iterator[Finding]:
    for port, purpose in PORTS.items():
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if taken:
            yield Finding(name=f"port {port}", verdict="warn", found="taken", advice=purpose)
        else:
            yield Finding(name=f"port {port}", verdict="ok", found="free")


def _programs() -> Iterator[Finding]:
    for name, (program, purpose) in PROGRAMS.items():
        path = shutil.which(program)
        if path is None:
            yield Finding(name=name, verdict="warn", found="not installed", advice=purpose)
        else:
            yield Finding(name=name, verdict="ok", found=path)
