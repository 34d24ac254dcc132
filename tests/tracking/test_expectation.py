"""An estimate beside what a run measured, and what finished runs of a directory say together."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.expectation import (
    ESTIMATE_FILE,
    Expectation,
    TypicalError,
    compare,
    read_expectation,
    typical_errors,
    write_expectation,
)
from pipeline.tracking.store import MetricValue, measured

EXPECTED = Expectation(
    device="cores", kind="cpu", family="gpt", num_ranks=2, step_seconds=1.1, peak_bytes=900.0,
    state_bytes=400,
)  # fmt: skip


def metrics(**values: float) -> dict[str, MetricValue]:
    found = {"perf/step_seconds": 1.0, "memory/peak_bytes": 1000.0, **values}
    return {name: measured(name, value) for name, value in found.items()}


def test_errors_are_estimated_over_measured_less_one() -> None:
    found = compare(EXPECTED, metrics(**{"memory/model_state_bytes": 400.0}), "cpu", 2)
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(
        {
            "estimate/step_seconds": 1.1,
            "estimate/step_error_fraction": 0.1,
            "estimate/peak_bytes": 900.0,
            "estimate/peak_error_fraction": -0.1,
            "estimate/state_bytes": 400.0,
            "estimate/state_error_fraction": 0.0,
        }
    )


def test_what_one_side_lacks_is_not_compared() -> None:
    without_hardware = EXPECTED.model_copy(update={"step_seconds": None})
    assert set(compare(without_hardware, metrics(), "cpu", 2)) == {
        "estimate/peak_bytes", "estimate/peak_error_fraction",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "num_ranks"), [("cuda", 2), ("cpu", 1)])
def test_a_run_on_other_machines_than_expected_is_not_compared(kind: str, num_ranks: int) -> None:
    assert compare(EXPECTED, metrics(), kind, num_ranks) == {}


def test_an_expectation_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_expectation(tmp_path, EXPECTED)
    assert read_expectation(tmp_path) == EXPECTED


@pytest.mark.parametrize("content", [None, "", "{", '{"device": "x"}', '{"unknown": 1}'])
def test_an_expectation_that_cannot_be_read_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / ESTIMATE_FILE).write_text(content)
    assert read_expectation(tmp_path) is None


def finished(directory: Path, error: float, **fields: Any) -> None:
    directory.mkdir(parents=True)
    write_expectation(directory, EXPECTED.model_copy(update=fields))
    values = {"estimate/step_error_fraction": {"value": error}}
    (directory / "result.json").write_text(json.dumps({"metrics": values}))


def test_typical_errors_are_of_finished_runs_of_the_device_and_family(tmp_path: Path) -> None:
    for name, error in (("a", -0.3), ("b", 0.1), ("study/runs/c", 0.2)):
        finished(tmp_path / name, error)
    finished(tmp_path / "other-device", 9.0, device="others")
    finished(tmp_path / "other-family", 9.0, family="lstm_attention")
    finished(tmp_path / "broken", 9.0)
    (tmp_path / "broken" / "result.json").write_text("{")
    finished(tmp_path / "unfinished", 9.0)
    (tmp_path / "unfinished" / "result.json").unlink()
    assert typical_errors(tmp_path, "cores", "gpt") == [
        TypicalError(
            quantity="step", median_fraction=0.2, largest_fraction=0.3, num_runs=3
        )
    ]  # fmt: skip
    assert typical_errors(tmp_path / "nowhere", "cores", "gpt") == []
