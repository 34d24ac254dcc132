"""Files of a run directory that MLflow shows as they are, such as traces of steps."""

from collections.abc import Mapping
from pathlib import Path

PROFILE_DIRECTORY = "profile"
"""Where a run puts traces and memory snapshots."""


def list_files(run_dir: Path) -> dict[str, Path]:
    """List the complete files of a run that become artifacts, by their name there."""
    paths = sorted((run_dir / PROFILE_DIRECTORY).glob("[!.]*"))
    return {f"{PROFILE_DIRECTORY}/{path.name}": path for path in paths if path.is_file()}


def identify_files(files: Mapping[str, Path]) -> dict[str, str]:
    """Give what changes when a file does, without reading it."""
    found = {name: path.stat() for name, path in files.items()}
    return {name: f"{stat.st_size}-{stat.st_mtime_ns}" for name, stat in found.items()}
