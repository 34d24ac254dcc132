"""From this machine to findings: cores, memory, room, limits, ports, programs."""

import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from launch.doctor_finding import GIB, Finding, Reporter
from launch.environment import base_environment

LEAST_MEMORY_GIB = 4.0
"""Two ranks with torch and DeepSpeed take about 1.5 GiB, a local Ray 1 GiB, MLflow 0.5 GiB."""
LEAST_DISK_GIB = 5.0
LEAST_SHARED_GIB = 0.3
"""Ray's object store stands in /dev/shm; a local Ray of this project takes 0.2 GiB."""
LEAST_TEMPORARY_GIB = 1.0
LEAST_FILES = 4096
"""Ray opens some sockets per worker and object; its own advice is 65536."""
MOST_TEMPORARY_CHARACTERS = 38
"""Ray's sockets stand below it with about 68 characters more, and Unix allows 107."""
LOCK_SECONDS = 600.0
"""No compile of one operator takes as long; an older lock was left by one that was killed."""
PROGRAMS = {
    "chromium": "only the tests of the report's page need it",
    "pdsh": "apt install pdsh, if `deepspeed --hostfile` is to start ranks over ssh",
    "ssh": "apt install openssh-client, if ranks are to run on other hosts",
}
PORTS = {5000: "MLflow's pages: choose another with ui --port", 29500: "the ranks of a hostfile"}
report = Reporter("machine")


def examine_machine() -> Iterator[Finding]:
    """Look at what this machine has; changes nothing."""
    yield _cores()
    yield _memory()
    room_for_runs = "make room for checkpoints, or set output_dir to a larger disk"
    yield _free_space("disk", Path.cwd(), LEAST_DISK_GIB, room_for_runs)
    room_for_ray = "Ray keeps its objects there: start the container with --shm-size=2g"
    yield _free_space("/dev/shm", Path("/dev/shm"), LEAST_SHARED_GIB, room_for_ray)
    yield _temporary_directory(Path(tempfile.gettempdir()))
    yield _open_files()
    yield extension_locks(os.environ)
    for port, purpose in PORTS.items():
        yield _port(port, purpose)
    for program, purpose in PROGRAMS.items():
        path = shutil.which(program)
        missing = report.warn(program, "not installed", purpose)
        yield missing if path is None else report.ok(program, path)


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if count is not None and count < 2:
        return report.warn("cores", str(count), "two ranks share one core: correct, and slow")
    return report.ok("cores", str(count))


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}"
    if memory.available / GIB < LEAST_MEMORY_GIB:
        advice = f"the quickstart wants {LEAST_MEMORY_GIB:g} GiB free: end other programs"
        return report.warn("memory", found, advice, free_bytes=memory.available)
    return report.ok("memory", found, free_bytes=memory.available)


def _free_space(name: str, path: Path, least_gib: float, advice: str) -> Finding:
    if not path.is_dir():
        return report.warn(name, "absent", advice)
    free_bytes = shutil.disk_usage(path).free
    found = f"{free_bytes / GIB:.1f} GiB free"
    if free_bytes < least_gib * GIB:
        return report.warn(
            name, found, f"{advice}; at least {least_gib:g} GiB", free_bytes=free_bytes
        )
    return report.ok(name, found, free_bytes=free_bytes)


def _temporary_directory(path: Path) -> Finding:
    if not os.access(path, os.W_OK):
        advice = "set TMPDIR to a directory that can be written"
        return report.fail("temporary", f"{path} cannot be written", advice)
    if len(str(path)) > MOST_TEMPORARY_CHARACTERS:
        found = f"{path} has {len(str(path))} characters"
        advice = (
            f"set TMPDIR to a path of at most {MOST_TEMPORARY_CHARACTERS}: Ray puts Unix sockets "
            "below it, and their paths end at 107"
        )
        return report.warn("temporary", found, advice)
    room = "make room, or set TMPDIR to a larger disk"
    space = _free_space("temporary", path, LEAST_TEMPORARY_GIB, room)
    return report.ok("temporary", f"{path}, {space.found}") if space.verdict == "ok" else space


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}"
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        advice = f"ulimit -n 65536 before the start; the system allows {hard}"
        return report.warn("open files", found, advice)
    return report.ok("open files", found)


def extension_locks(environment: Mapping[str, str]) -> Finding:
    """Look for locks of compiles that were killed; who needs such an operator waits for ever.

    Args:
        environment: Names the caches by TORCH_EXTENSIONS_DIR, XDG_CACHE_HOME and HOME.
    """
    named = environment.get("TORCH_EXTENSIONS_DIR")
    cache = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # Ranks that this project starts use their own, `deepspeed` by hand torch's.
    ours = base_environment("cpu", 1)["TORCH_EXTENSIONS_DIR"]
    places = [Path(named)] if named else [Path(ours), Path(cache) / "torch_extensions"]
    locks = [lock for place in places if place.is_dir() for lock in place.rglob("lock")]
    stale = [lock for lock in locks if time.time() - lock.stat().st_mtime > LOCK_SECONDS]
    if stale:
        removal = "rm " + " ".join(str(lock) for lock in stale)
        advice = f"{removal} if no compile runs: every start that needs the operator hangs on it"
        return report.warn("extensions", f"{len(stale)} old lock files", advice)
    return report.ok("extensions", f"no old lock in {', '.join(str(place) for place in places)}")


def _port(port: int, purpose: str) -> Finding:
    with socket.socket() as probe:
        is_taken = probe.connect_ex(("127.0.0.1", port)) == 0
    if is_taken:
        return report.warn(f"port {port}", "taken", purpose)
    return report.ok(f"port {port}", "free")
