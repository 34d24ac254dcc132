"""Runs to break, runs without faults to compare them with, and the table of what faults cost."""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.harness import Chaos, History, chaos_run, nothing_left
from tests.training.cases import write_prepared

Golden = Callable[..., History]
Note = Callable[[str, History], None]


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Few validation tokens: each evaluation takes as long as it has batches.
    return write_prepared(tmp_path_factory.mktemp("data") / "prepared", validation_tokens=100)


@pytest.fixture
def chaos(tmp_path: Path, prepared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chaos]:
    with nothing_left():
        yield Chaos(tmp_path, prepared_dir, monkeypatch)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory, prepared_dir: Path) -> Golden:
    """Give the run without faults of a family and stage; two of them must agree to count."""
    kept: dict[tuple[str, int], History] = {}
    root = tmp_path_factory.mktemp("golden")

    def give(family: str = "gpt", stage: int = 1) -> History:
        if (family, stage) not in kept:
            with pytest.MonkeyPatch.context() as patch:
                place = Chaos(root, prepared_dir, patch)
                runs = []
                for number in (1, 2):
                    run_dir = place.make(f"{family}-{stage}-{number}", chaos_run(family, stage))
                    runs.append(place.survive(run_dir))
            first, second = runs
            assert [len(run.endings) for run in runs] == [1, 1]
            assert (first.losses, first.samples) == (second.losses, second.samples)
            assert first.weights == second.weights, "two runs without faults differ"
            kept[family, stage] = first
        return kept[family, stage]

    return give


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Keep what a case cost, for the table at the end."""

    def keep(name: str, seen: History) -> None:
        record_property(
            "fault",
            {
                "name": name,
                "wasted_steps": [seen.wasted_steps],
                "detection_seconds": seen.detection_seconds,
                "recovery_seconds": seen.recovery_seconds,
            },
        )

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each fault cost, over all cases that passed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for report in terminalreporter.getreports("passed"):
        for name, case in report.user_properties:
            if name == "fault":
                found.setdefault(case["name"], []).append(case)
    if found:
        terminalreporter.write_line("fault, cases, steps wasted, s to detect, s to first new step")
    for name, cases in sorted(found.items()):
        cells = [
            _range([number for case in cases for number in case[column]])
            for column in ("wasted_steps", "detection_seconds", "recovery_seconds")
        ]
        terminalreporter.write_line(", ".join([name, str(len(cases)), *cells]))


def _range(numbers: list[float]) -> str:
    if not numbers:
        return "-"
    middle = statistics.median(numbers)
    return f"{min(numbers):.3g} to {max(numbers):.3g} (median {middle:.3g})"
