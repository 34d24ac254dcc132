"""Runs a command and says what it took: wall time, and processor time of the whole machine."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

TIMEOUT_SECONDS = 3600
ERROR_LINES = 30


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a command."""

    seconds: float
    cpu_seconds: float
    """User and system time of every process of the machine meanwhile."""
    output: str


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, smallest and largest of several repeats."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Give the spread of at least one value."""
        return cls(median=median(values), min=min(values), max=max(values))


def run_command(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Run:
    """Run a command to its end, with nothing waiting to be written to disk before it.

    Raises:
        SystemExit: It failed; the message holds its last lines.
    """
    os.sync()
    cpu_before, started = machine_cpu_seconds(), time.perf_counter()
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-ERROR_LINES:])
        raise SystemExit(f"exit code {done.returncode} from {' '.join(command)}\n{last}")
    cpu_seconds = machine_cpu_seconds() - cpu_before
    return Run(seconds=seconds, cpu_seconds=cpu_seconds, output=done.stdout)


def machine_cpu_seconds() -> float:
    """Give user, nice and system seconds of all cores since the start of the machine."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def cpu_model() -> str:
    """Give the processor's name, or `unknown`."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def versions_in(python: str, packages: Sequence[str]) -> dict[str, str]:
    """Give the versions of those packages that an interpreter has."""
    code = (
        "import sys\nfrom tests.bench.timing import own_versions\n"
        "print('\\n'.join(f'{k}={v}' for k, v in own_versions(sys.argv[1:]).items()))"
    )
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{python} cannot run this project: {done.stderr[-500:]}")
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def own_versions(packages: Sequence[str]) -> dict[str, str]:
    """Give the versions of those packages that are installed here."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
