"""`bench RUN` on real ranks of this machine."""

from pathlib import Path

import pytest

from launch.verbs_bench import LABELS, show_value
from tests.launch.conftest import Cli


@pytest.mark.slow
def test_bench_measures_a_run_on_two_ranks_and_leaves_it_alone(cli: Cli, tiny_run: Path) -> None:
    arguments = ("bench", tiny_run, "name=benched", "--workers", "2", "--steps", "4")
    answer = cli(*arguments, "--json")
    assert answer.code == 0, answer.err
    run_dir = Path(answer.tree["run_dir"])
    assert run_dir.name == "benched-bench"
    assert not run_dir.with_name("benched").exists()
    assert answer.tree["world_size"] == 2
    measured = answer.tree["measured"]
    assert list(measured) == list(LABELS)
    assert measured["step_seconds"]["num"] == 4
    assert measured["step_seconds"]["unit"] == "s"
    # Measured anew, and shown to a person.
    shown = cli(*arguments)
    assert shown.code == 0
    for label in LABELS.values():
        assert label.strip() in shown.out


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
