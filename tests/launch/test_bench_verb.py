"""`bench RUN` on real ranks of this machine."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from launch.verbs_bench import LABELS, build_table, show_value
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
