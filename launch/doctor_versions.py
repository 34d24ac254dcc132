"""From installed packages to findings: what the project asks for, and what must never be run."""

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from launch.doctor_finding import Finding, Reporter

PROJECT_FILE = Path(__file__).resolve().parent.parent / "pyproject.toml"
DISTRIBUTION = "tandem-pretraining"
COMPARED_PACKAGES = (
    "torch", "deepspeed", "ray", "mlflow", "pyarrow", "datasets", "tokenizers", "numpy",
    "pydantic", "safetensors", "psutil",
)  # fmt: skip
"""Those whose versions must be equal on all hosts."""


@dataclass(frozen=True)
class Floor:
    """The least version that may be run, whatever else is asked for."""

    versions: str
    reason: str


FLOORS = {
    "torch": Floor(
        ">=2.10", "older ones run code from a weights file (CVE-2025-32434, CVE-2026-24747)"
    ),
    "deepspeed": Floor(">=0.15.1", "older ones run commands from a hostfile (CVE-2024-43497)"),
    "ray": Floor(
        ">=2.56",
        "older ones run code from Parquet and tar files (CVE-2026-41486, CVE-2026-57516) and "
        "delete jobs for anybody (CVE-2026-27482)",
    ),
    "mlflow": Floor(">=3.10", "a server of an older one lets strangers in (CVE-2026-2652)"),
    "pyarrow": Floor(">=14.0.1", "older ones run code from a Parquet file (CVE-2023-47248)"),
    "datasets": Floor(">=4", "older ones run the Python script of a data set"),
}
"""Package to its floor. Source: the CVE records named; datasets 4.0.0 release notes."""
RANGE_REASON = "the range that this project is tested with"


def examine_versions() -> Iterator[Finding]:
    """Compare what is installed with floors and stated ranges; nothing is imported."""
    report = Reporter("versions")
    yield report.ok("python", f"{sys.version.split()[0]} {sys.executable}")
    installed = {}
    for name in FLOORS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    yield from judge_versions(installed, _stated_ranges())


def judge_versions(
    installed: Mapping[str, str], ranges: Mapping[str, SpecifierSet]
) -> Iterator[Finding]:
    """Judge versions of the packages that have a floor.

    Args:
        installed: Package to version; a package that is not installed is absent.
        ranges: Package to the versions that the project asks for.
    """
    report = Reporter("versions")
    for name, floor in FLOORS.items():
        version = installed.get(name)
        stated = ranges.get(name, SpecifierSet())
        wanted = f"pip install '{name}{stated or floor.versions}'"
        if version is None:
            yield report.fail(name, "not installed", "pip install -e .")
        elif not SpecifierSet(floor.versions).contains(version, prereleases=True):
            yield report.fail(name, f"{version}, not {floor.versions}", f"{wanted}: {floor.reason}")
        elif not stated.contains(version, prereleases=True):
            yield report.fail(name, f"{version}, not {stated}", f"{wanted}: {RANGE_REASON}")
        else:
            yield report.ok(name, f"{version}, in {stated or floor.versions}")


def _stated_ranges() -> dict[str, SpecifierSet]:
    """Give what pyproject.toml beside the code asks for, else the installed metadata."""
    if PROJECT_FILE.is_file():
        lines = tomllib.loads(PROJECT_FILE.read_text())["project"]["dependencies"]
    else:
        try:
            lines = importlib.metadata.requires(DISTRIBUTION) or []
        except importlib.metadata.PackageNotFoundError:
            lines = []
    requirements = [Requirement(line) for line in lines]
    return {item.name: item.specifier for item in requirements if item.marker is None}
