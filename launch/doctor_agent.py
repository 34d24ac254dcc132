"""From questions on standard input to answers on standard output, on any host with a Python.

The text of this file is sent to a host's `python -c`, so that it tells about a host even where the
project is missing or differs. What is not in Python itself is imported inside the question that
needs it. A question and an answer are one line of JSON each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

GIT_SECONDS = 10
LOOK_UP_SECONDS = 12.0
"""A DNS server that gives no answer costs 10 s a look-up with the usual resolver settings."""
GROUP_SECONDS = 20
"""How long two ranks may wait for each other."""
ONE_SIZE_SECONDS = 1.0
"""Time that the repeats of one message size may take."""
MOST_REPEATS = 20
SLOW_SECONDS = 0.3
"""Sizes that follow one that takes longer are left out: 16 times as much could take minutes."""


def facts(packages: list[str]) -> dict[str, Any]:
    """Give this host's Python, the code that ranks would load, and versions of packages."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": versions,
        "code": _code(),
    }


def _code() -> dict[str, Any] | None:
    """Give root, commit and the hash of every source file, or None where there is no project."""
    spec = importlib.util.find_spec("launch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).resolve().parent.parent
    paths = sorted(path for top in ("launch", "pipeline") for path in (root / top).rglob("*.py"))
    hashes = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in paths
    }
    return {"root": str(root), "commit": _git(root, "rev-parse", "--short", "HEAD"),
            "is_dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
            "files": hashes}  # fmt: skip


def _git(directory: Path, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(directory), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def set_defaults(variables: dict[str, str]) -> None:
    """Set variables of the asking process, as ranks get them: what this host sets itself stays."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def machine() -> list[dict[str, Any]]:
    """Give the findings about this machine by itself."""
    from launch.doctor_machine import examine_machine

    return [dataclasses.asdict(finding) for finding in examine_machine()]


def clock() -> float:
    """Give the wall clock in Unix seconds."""
    return time.time()


def storage(directory: str, name: str) -> dict[str, Any]:
    """Read a file of a shared directory, answer with a second one, and give the free space.

    Returns:
        `text` of the file, the answer's file name and `free_bytes`; without a directory nothing,
        without the file no text.
    """
    path = Path(directory)
    if not path.is_dir():
        return {}
    free_bytes = shutil.disk_usage(path).free
    try:
        text = (path / name).read_text()
    except FileNotFoundError:
        return {"free_bytes": free_bytes}
    answer_name = f"{name}-{socket.gethostname()}-{os.getpid()}"
    (path / answer_name).write_text(text)
    return {"free_bytes": free_bytes, "text": text, "answer_name": answer_name}


def network(names: list[str]) -> dict[str, Any]:
    """Give interfaces, what this host's own and other names resolve to, and reverse look-ups.

    Args:
        names: Names of the other hosts; without any, this host's own addresses are looked up.
    """
    own = socket.gethostname()
    resolved = {name: _resolve(name) for name in dict.fromkeys([own, *names])}
    interfaces = _interfaces()
    wanted = [address for name in names for address in resolved[name][:1]]
    if not names:
        every = [address for addresses in interfaces.values() for address in addresses]
        wanted = [address for address in every if "%" not in address]
    outside = [a for a in dict.fromkeys(wanted) if not a.startswith("127.") and a != "::1"]
    return {
        "hostname": own,
        "resolved": resolved,
        "interfaces": interfaces,
        "bindable": [address for address in resolved[own] if _can_bind(address)],
        "chosen": {name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
                   if name in os.environ},
        "reverse_seconds": _reverse_seconds(outside),
    }  # fmt: skip


def _resolve(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _can_bind(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _interfaces() -> dict[str, list[str]]:
    """Give the interfaces that are up, in the kernel's order, with their IP addresses."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
        if name in up
    }


def _reverse_seconds(addresses: list[str]) -> dict[str, float]:
    """Time how long each address takes to become a name, all at once; the slow ones are cut."""
    seconds: dict[str, float] = {}

    def look_up(address: str) -> None:
        started = time.perf_counter()
        socket.getnameinfo((address, 0), 0)
        seconds[address] = time.perf_counter() - started

    threads = [threading.Thread(target=look_up, args=(a,), daemon=True) for a in addresses]
    for thread in threads:
        thread.start()
    deadline = time.perf_counter() + LOOK_UP_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.perf_counter()))
    return {address: seconds.get(address, LOOK_UP_SECONDS) for address in addresses}


def devices() -> dict[str, Any]:
    """Give the GPUs that the driver shows, and what torch can do with them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() not in ("", "-1")
    is_usable = visible and torch.cuda.is_available()
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "listed": _listed_gpus(),
        "is_hidden": not visible,
        "usable": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        if is_usable
        else [],
        "nccl": list(_nccl_version()) if is_usable and has_nccl else None,
        "has_gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    }


def _nccl_version() -> Any:
    import torch

    return torch.cuda.nccl.version()  # type: ignore[no-untyped-call]


def _listed_gpus() -> list[str]:
    """Give `name, driver version` of each GPU; device files where nvidia-smi is missing."""
    if shutil.which("nvidia-smi") is None:
        return sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return ["a GPU whose nvidia-smi gave no answer in 20 s"]
    return shown.stdout.splitlines() if shown.returncode == 0 else []


def free_port() -> int:
    """Give a TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def all_reduce(rank: int, address: str, port: int, backend: str, sizes: list[int]) -> list[Any]:
    """Time all-reduces with one other rank.

    Args:
        rank: 0 or 1.
        address: Of rank 0, as rank 1 reaches it.
        port: Free on rank 0's host.
        backend: gloo or nccl.
        sizes: Message sizes in bytes, ascending.

    Returns:
        For each size that was reached: bytes, median seconds, number of repeats.
    """
    import datetime

    import torch
    from torch import distributed

    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=GROUP_SECONDS),
    )  # fmt: skip
    try:
        measured: list[Any] = []
        for size in sizes:
            message = torch.zeros(size // 4, device=device)
            first = torch.tensor(min(_timed(message), _timed(message)), device=device)
            # Both ranks must repeat as often: the slower one decides.
            distributed.all_reduce(first, op=distributed.ReduceOp.MAX)
            slowest = float(first)
            repeats = max(1, min(MOST_REPEATS, int(ONE_SIZE_SECONDS / max(slowest, 1e-6))))
            times = [_timed(message) for _ in range(repeats)]
            measured.append([size, statistics.median(times), repeats])
            if slowest > SLOW_SECONDS:
                break
        return measured
    finally:
        distributed.destroy_process_group()


def _timed(message: Any) -> float:
    """Give the seconds of one all-reduce, until its result is there."""
    import torch
    from torch import distributed

    if message.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    distributed.all_reduce(message)
    if message.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


QUESTIONS: dict[str, Callable[..., Any]] = {
    "facts": facts,
    "set_defaults": set_defaults,
    "machine": machine,
    "clock": clock,
    "storage": storage,
    "network": network,
    "devices": devices,
    "free_port": free_port,
    "all_reduce": all_reduce,
}


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the questions end; an error of a question is its answer."""
    for line in questions:
        request = json.loads(line)
        try:
            reply = {"answer": QUESTIONS[request["ask"]](**request["arguments"])}
        except Exception as exc:  # whoever asks decides what it means
            reply = {"error": f"{type(exc).__name__}: {exc}"}
        answers.write(json.dumps(reply).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    # What libraries print must not stand between answers.
    answer_stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answer_stream)
    # A look-up that still waits for DNS would hold the exit.
    os._exit(0)
