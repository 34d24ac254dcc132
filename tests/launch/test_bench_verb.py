"""`bench RUN` on real ranks of this machine."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from launch.bench_machine import check_request, measure
from launch.display import Display
from launch.verbs_bench import LABELS, build_table, show_value
from pipeline.config.load import load_cluster
from tests.launch.conftest import Cli


@pytest.mark.slow
def test_bench_measures_a_run_on_two_ranks_and_leaves_it_alone(cli: Cli, tiny_run: Path) -> None:
    answer = cli("bench", tiny_run, "name=benched", "--workers", "2", "--steps", "4", "--json")
    assert answer.code == 0, answer.err
    run_dir = Path(answer.tree["run_dir"])
    assert run_dir.name == "benched-bench"
    assert not run_dir.with_name("benched").exists()
    assert answer.tree["world_size"] == 2
    measured = answer.tree["measured"]
    assert list(measured) == list(LABELS)
    assert measured["step_seconds"]["num"] == 4
    assert measured["step_seconds"]["unit"] == "s"


@pytest.mark.slow
def test_a_measured_machine_estimates_a_run_that_then_says_how_far_off_that_was(
    cli: Cli, tiny_run: Path, tmp_path: Path
) -> None:
    machine = tmp_path / "machine.yaml"
    cluster = check_request(machine, None, None, 2)
    measured = measure(cluster, machine, Display(as_json=True), seconds_per_point=0.01)
    hardware = load_cluster(machine).hardware
    assert hardware is not None
    assert hardware.intra_node is not None
    assert measured["hardware"]["device"] == hardware.device
    name = "name=expected"
    trained = cli("train", tiny_run, name, "--cluster", machine, "--workers", "1", "--json")
    assert trained.code == 0, trained.err
    metrics = trained.tree["metrics"]
    expected = json.loads((Path(trained.tree["run_dir"]) / "estimate.json").read_text())
    ratio = expected["step_seconds"] / metrics["perf/step_seconds"]
    assert metrics["estimate/step_error_fraction"] == pytest.approx(ratio - 1)
    assert metrics["estimate/state_error_fraction"] == 0.0
    told = cli("estimate", tiny_run, name, "--cluster", machine, "--workers", "1", "--json")
    assert told.tree["errors"]["state"] == {
        "median_fraction": 0.0, "largest_fraction": 0.0, "num_runs": 1,
    }  # fmt: skip


def test_the_table_shows_every_measurement_on_a_line_of_80_columns() -> None:
    records = [
        {"name": name, "value": 1234.5, "num": 20, "spread": 12.5, "unit": "tokens/s"}
        for name in LABELS
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(build_table("a run", records))
    cells = [line.split("│") for line in console.export_text().splitlines() if "│" in line]
    assert [row[1].strip() for row in cells] == [label.strip() for label in LABELS.values()]
    assert all(row[2].strip() == "1,234.5 tokens/s" for row in cells)


def test_bench_refuses_too_few_steps_before_anything_starts(cli: Cli, tiny_run: Path) -> None:
    answer = cli("bench", tiny_run, "--steps", "3")
    assert answer.code == 2
    assert "steps" in answer.err


def test_dry_run_names_directory_and_command(cli: Cli, tiny_run: Path) -> None:
    tree = cli("bench", tiny_run, "--dry-run", "--json", "--workers", "2").tree
    assert tree["run_dir"].endswith("/tiny-bench")
    assert (tree["probe"], tree["params"]) == ("bench", {"steps": 20})


def test_values_are_printed_in_the_units_that_people_read() -> None:
    assert show_value(0.25, "s") == "250.0 ms"
    assert show_value(3 * 2**20, "bytes") == "3.0 MiB"
    assert show_value(0.155, "1") == "15.5 %"
    assert show_value(1234.0, "tokens/s") == "1,234.0 tokens/s"
