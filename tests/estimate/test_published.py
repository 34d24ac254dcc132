"""Predictions beside published throughputs of other systems on GPUs.

One set of constants a machine; one row a machine set its `product_fraction`, and counts nowhere.
"""

import re
import statistics
from itertools import combinations
from pathlib import Path

import pytest

from pipeline.config.load import load_cluster
from pipeline.estimate.forecast import (
    FOREIGN_ERROR_FRACTION,
    MEASURED_ERROR_FRACTION,
    PUBLISHED_ERROR_FRACTION,
    Machines,
    predict_fit,
)
from pipeline.estimate.step_time import step_time
from tests.estimate.published import CLUSTERS, TITAN, Row, hardware_of, own, rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "estimate.md"
ROWS = rows()
HELD_OUT = [row for row in ROWS if not row.is_calibration]

MEDIAN_ERROR = 0.25
"""What issue and page promise."""
LARGEST_ERROR = 0.45
"""No single row may be further off, in either direction."""
NEAR = 0.15
"""Rows of one machine closer than this have no order that a model could be held to."""


def test_each_machine_has_one_row_that_set_it() -> None:
    calibrating = [row.cluster for row in ROWS if row.is_calibration]
    assert sorted(calibrating) == ["a100-8", "gpu-24gb", "h100-8"]
    for row in ROWS:
        if row.is_calibration:
            assert abs(row.error_fraction) < 0.02, row.name


def test_all_clusters_of_one_device_have_the_same_constants() -> None:
    """H100 files differ in hosts, links and storage only: nothing is tuned to a row."""
    differing = {"num_nodes", "inter_node", "storage_bytes_per_second"}
    texts = [CLUSTERS / f"h100-{count}.yaml" for count in (8, 64, 1024)]
    trees = []
    for path in texts:
        hardware = load_cluster(path).hardware
        assert hardware is not None
        trees.append(hardware.model_dump(exclude=differing))
    assert trees[0] == trees[1] == trees[2]


def test_held_out_throughputs_are_within_a_quarter_at_the_median() -> None:
    errors = [abs(row.error_fraction) for row in HELD_OUT]
    assert len(errors) >= 30
    assert statistics.median(errors) <= MEDIAN_ERROR
    assert max(errors) <= LARGEST_ERROR


def test_the_error_that_estimate_prints_is_that_of_the_held_out_rows() -> None:
    errors = [abs(row.error_fraction) for row in HELD_OUT]
    assert statistics.median(errors) == pytest.approx(PUBLISHED_ERROR_FRACTION, abs=0.005)
    setting = {(row.source, row.device) for row in ROWS if row.is_calibration}
    foreign = [abs(row.error_fraction) for row in ROWS if (row.source, row.device) not in setting]
    assert len(foreign) == 9
    assert statistics.median(foreign) == pytest.approx(FOREIGN_ERROR_FRACTION, abs=0.01)


def test_runs_that_were_published_are_not_refused() -> None:
    """What ran fits. Left out: torchtitan's devices, which have 96 GB."""
    for row in ROWS:
        if row.source == TITAN:
            continue
        hardware = hardware_of(row.cluster, row.num_ranks)
        machines = Machines(hardware=hardware, num_ranks=row.num_ranks)
        assert predict_fit(row.run, row.vocab_size, machines).is_enough, row.name


def test_own_steps_on_a_cpu_are_off_by_what_estimate_prints() -> None:
    """None of them set a constant: the file holds measurements of single operations."""
    hardware = hardware_of("cpu-2-cores", 1)
    errors = [step_time(run, 4096, 1, hardware).seconds / seconds - 1 for _, run, seconds in own()]
    spread = [abs(error) for error in errors]
    assert statistics.median(spread) == pytest.approx(MEASURED_ERROR_FRACTION, abs=0.005)
    assert max(spread) < 0.3


@pytest.mark.parametrize("source", sorted({row.source for row in ROWS}))
def test_predictions_are_in_the_published_order(source: str) -> None:
    """Of models on one machine, and of one model over machines."""
    of_source = [row for row in ROWS if row.source == source]
    wrong = [
        f"{one.name} and {other.name}"
        for one, other in combinations(of_source, 2)
        if (one.device == other.device or one.name == other.name)
        and _are_apart(one, other)
        and (one.predicted > other.predicted) != (one.tokens_per_second > other.tokens_per_second)
    ]
    assert not wrong


def test_the_page_shows_every_row_with_its_prediction() -> None:
    lines = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([+-]\d+)% \|",
        PAGE.read_text(encoding="utf-8"), re.M,
    )  # fmt: skip
    shown = {(name, cluster, int(ranks), rate) for name, cluster, ranks, rate, *_ in lines}
    assert shown == {
        (row.name, row.cluster, row.num_ranks, f"{row.tokens_per_second:,.0f}") for row in ROWS
    }
    for name, cluster, ranks, _, predicted, error in lines:
        row = next(
            row for row in ROWS
            if (row.name, row.cluster, row.num_ranks) == (name, cluster, int(ranks))
        )  # fmt: skip
        assert float(predicted.replace(",", "")) == pytest.approx(row.predicted, rel=0.01), name
        assert int(error) == pytest.approx(100 * row.error_fraction, abs=1), name


def _are_apart(one: Row, other: Row) -> bool:
    low, high = sorted((one.tokens_per_second, other.tokens_per_second))
    return high > (1 + NEAR) * low
