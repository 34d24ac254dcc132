"""From the machine and the installed packages to the `environment.json` of a run.

An allow-list: environment variables, arguments and paths never enter, so no secret can. The one
exception is a commit, checked to be nothing but a hexadecimal number.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

import pipeline
from pipeline.tracking.store import write_json_atomic

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    "tandem-pretraining", "torch", "deepspeed", "ray", "mlflow", "numpy", "tokenizers",
    "fastokens", "datasets", "pydantic", "safetensors",
)  # fmt: skip
COMMIT_VARIABLE = "TANDEM_GIT_COMMIT"
"""The commit of a copy of this project that has no checkout, such as a Ray job's."""
GIT_SECONDS = 10
"""A git that hangs, on a dead network mount, must not hang the run."""


def collect_environment() -> dict[str, Any]:
    """Describe the machine and the installation; what cannot be told is absent.

    Package versions come from their metadata, nothing is imported.
    """
    memory = psutil.virtual_memory().total
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "cpu_model": _cpu_model(),
        "num_cores": psutil.cpu_count(logical=True),
        "memory_bytes": memory,
        "packages": _package_versions(),
        **_git_state(),
    }
    return {name: value for name, value in environment.items() if value is not None}


def write_environment(run_dir: Path, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `environment.json` into a run directory and give its content.

    Args:
        run_dir: An existing run directory.
        extra: What only the caller knows, such as the device's name.
    """
    environment = {**collect_environment(), **(extra or {})}
    write_json_atomic(run_dir / ENVIRONMENT_FILE, environment)
    return environment


@functools.cache
def source_hashes() -> dict[str, str]:
    """Give the sha256 of each source of this package by its path in it, when first asked."""
    root = Path(pipeline.__file__).parent
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.py"))
    }


def code_hash() -> str:
    """Give the sha256 over the names and hashes of this package's sources."""
    return hashlib.sha256(json.dumps(source_hashes()).encode()).hexdigest()


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or None


def _git_state() -> dict[str, Any]:
    """Commit of the checkout this package is part of, and whether tracked files differ from it.

    A copy without a checkout takes the commit that whoever made the copy has stated.
    """
    package_dir = Path(pipeline.__file__).parent
    tracked = _git(package_dir, "ls-files", "--error-unmatch", "errors.py")
    commit = _git(package_dir, "rev-parse", "HEAD") if tracked else None
    if commit is None:
        stated = os.environ.get(COMMIT_VARIABLE, "").strip().lower()
        return {"git_commit": stated} if re.fullmatch(r"[0-9a-f]{7,64}", stated) else {}
    changes = _git(package_dir, "status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit, "git_is_dirty": bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
