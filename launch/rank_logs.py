"""Where the output of each rank goes, and how its end is quoted."""

import faulthandler
import os
import sys
from pathlib import Path

LOG_NAME = "rank-{rank}.log"
QUOTED_LINES = 12


def log_path(run_dir: Path, rank: int) -> Path:
    """Give the file that holds what a rank printed."""
    return run_dir / LOG_NAME.format(rank=rank)


def redirect_output(path: Path) -> None:
    """Send everything this process prints, native libraries included, to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable(file=2)


def last_lines(path: Path, num_lines: int = QUOTED_LINES) -> str:
    """Give the end of a log, indented for quoting in a message; empty where there is none."""
    if not path.exists():
        return ""
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(max(0, size_bytes - 16384))
        text = stream.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-num_lines:])
