"""`estimate` as people and programs call it, `train --force`, and a study's dry run."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.config.load import dump_yaml, load_run
from pipeline.tracking.expectation import Expectation, write_expectation
from tests.estimate.published import CLUSTERS
from tests.launch.conftest import Cli

RUNS = CLUSTERS.parent / "run"
STUDIES = CLUSTERS.parent / "study"
GPT, LSTM = RUNS / "gpt_125m_fineweb10b.yaml", RUNS / "lstm_125m_fineweb10b.yaml"
H100 = CLUSTERS / "h100-8.yaml"
CPU = CLUSTERS / "cpu-2-cores.yaml"
WIDTH = 100


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("TANDEM_OUTPUT", str(tmp_path))


def with_hardware(tmp_path: Path, **update: object) -> Path:
    """Write the CPU cluster with other figures."""
    tree = yaml.safe_load(CPU.read_text())
    tree["hardware"].update(update)
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_an_estimate_says_everything_within_the_width_of_a_terminal(cli: Cli) -> None:
    shown = cli("estimate", GPT, "--cluster", H100)
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    for word in ("memory of a rank: fits", "one step:", "speed", "MFU", "chain", "time", "goodput",
                 "cost", "best", "speed was 8% off"):  # fmt: skip
        assert word in shown.out, word
    assert any("=" in line and "GiB" not in line for line in lines)


def test_an_estimate_for_a_program_holds_the_same(cli: Cli) -> None:
    tree = cli("estimate", LSTM, "--cluster", H100, "--workers", "4", "--json").tree
    assert (tree["num_workers"], tree["fits"]) == (4, True)
    step = tree["step"]
    parts = ("products", "attention", "recurrence", "between", "dispatch", "update", "exposed",
             "data_wait")  # fmt: skip
    assert sum(step[f"{part}_seconds"] for part in parts) == pytest.approx(step["step_seconds"])
    assert tree["tokens_per_second"] == pytest.approx(262_144 / step["step_seconds"])
    assert 0 < tree["mfu_fraction"] < 1
    assert tree["memory"]["needed_bytes"] < tree["memory"]["capacity_bytes"]
    assert {component["exact"] for component in tree["memory"]["components"]} == {True, False}
    assert tree["cost"]["currency"] == "USD"
    assert tree["best"]["tokens_per_second"] >= tree["tokens_per_second"]
    assert tree["best"]["overrides"][0].startswith("train.micro_batch_samples=")


def test_a_cluster_without_hardware_names_those_that_have_it(cli: Cli) -> None:
    shown = cli("estimate", GPT, "--cluster", CLUSTERS / "local-2.yaml")
    assert shown.code == 2
    assert "`hardware` is not stated, and nothing is guessed" in shown.err
    assert "h100-8.yaml" in shown.err


def test_a_price_that_is_missing_is_said_and_not_guessed(cli: Cli) -> None:
    arguments = ("estimate", GPT, "--cluster", CLUSTERS / "a100-8.yaml")
    assert "unknown: the cluster file states no hardware.price" in cli(*arguments).out
    assert cli(*arguments, "--json").tree["cost"] is None


def test_a_peak_that_is_missing_is_named(cli: Cli) -> None:
    shown = cli("estimate", GPT, "--cluster", CPU)
    assert shown.code == 2
    assert "peak_flops_per_second.bf16 is missing" in shown.err


def test_a_run_that_does_not_fit_is_told_what_to_change(cli: Cli) -> None:
    wide = ("model.width=8192", "model.heads=64", "model.depth=48", "zero.stage=0")
    shown = cli("estimate", GPT, "--cluster", H100, *wide)
    assert shown.code == 0
    assert "DOES NOT FIT" in shown.out
    # 39 billion parameters: 624 GB at 16 bytes each are 78 GB on each of 8 devices of 85.5 GB.
    assert "to fit: " in shown.out


def test_a_sweep_shows_both_families_and_where_the_chain_bites(cli: Cli, tmp_path: Path) -> None:
    picture = tmp_path / "sweep.html"
    arguments = ("estimate", LSTM, "--cluster", CLUSTERS / "h100-1024.yaml", "--sweep",
                 "nodes=1..128", "train.global_batch_tokens=4194304", "--beside", GPT)  # fmt: skip
    shown = cli(*arguments, "--picture", picture)
    assert shown.code == 0, shown.err
    assert max(map(len, shown.out.splitlines())) <= max(WIDTH, len(str(picture)) + 10)
    assert "weak scaling" in shown.out
    assert "lstm_attention: no step is shorter than 163.8 ms" in shown.out
    assert "it bites from" in shown.out
    assert "gpt: no recurrence" in shown.out
    page = picture.read_text(encoding="utf-8")
    assert "lstm_attention, strong" in page
    assert "Modelled scaling over hosts" in page


def test_a_sweep_matches_the_other_family_in_size(cli: Cli) -> None:
    tree = cli("estimate", GPT, "--cluster", H100, "--sweep", "nodes=1..1", "--json").tree
    assert {point["label"] for point in tree["points"]} == {"gpt", "lstm_attention"}


def test_runs_of_one_name_stay_apart_with_their_own_vocabularies(cli: Cli, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(dump_yaml(load_run(GPT, ["model.vocab_size=100608"])))
    arguments = ("estimate", GPT, "--cluster", H100, "--sweep", "nodes=1..1", "--beside", other)
    points = cli(*arguments, "--json").tree["points"]
    weak = [point for point in points if point["scaling"] == "weak"]
    assert len({point["label"] for point in weak}) == 2
    assert weak[0]["products_seconds"] < 0.95 * weak[1]["products_seconds"]


def test_errors_of_finished_runs_are_told(cli: Cli, tmp_path: Path) -> None:
    for name, error in (("first", 0.2), ("second", -0.1)):
        run_dir = tmp_path / name
        run_dir.mkdir()
        expected = Expectation(
            device="NVIDIA H100 SXM 80 GB", kind="cuda", family="gpt", num_ranks=8,
            step_seconds=1.0, peak_bytes=1.0, state_bytes=1,
        )  # fmt: skip
        write_expectation(run_dir, expected)
        metrics = {"estimate/step_error_fraction": {"value": error}}
        (run_dir / "result.json").write_text(json.dumps({"metrics": metrics}))
    arguments = ("estimate", GPT, "--cluster", H100)
    said = "gpt runs here were off, at the median: time of a step 15.0% (largest 20%, 2 runs)"
    assert said in cli(*arguments).out
    assert cli(*arguments, "--json").tree["errors"]["step"]["num_runs"] == 2
    assert "compared with no run on a GPU" in cli("estimate", LSTM, "--cluster", H100).out


def test_options_of_a_sweep_need_one(cli: Cli) -> None:
    shown = cli("estimate", GPT, "--cluster", H100, "--beside", LSTM)
    assert shown.code == 2
    assert "belong to a sweep" in shown.err


def test_training_that_cannot_fit_is_refused_with_the_table_unless_forced(
    cli: Cli, tmp_path: Path
) -> None:
    small = with_hardware(tmp_path, memory_bytes=2e8)
    arguments = ("train", RUNS / "gpt.yaml", "--cluster", small, "--dry-run")
    refused = cli(*arguments)
    assert refused.code == 2
    assert "gpt cannot fit; --force starts it all the same" in refused.err
    assert "DOES NOT FIT" in refused.err
    assert "GiB" in refused.err
    assert cli(*arguments, "--force").code == 0
    assert cli("train", RUNS / "gpt.yaml", "--cluster", CPU, "--dry-run").code == 0


def test_a_dry_run_of_a_study_estimates_every_training_cell(cli: Cli) -> None:
    arguments = ("study", STUDIES / "quickstart.yaml", "--dry-run", "--cluster", CPU)
    tree = cli(*arguments, "--json").tree
    estimates = [cell["estimate"] for cell in tree["cells"]]
    known = [found for found in estimates if found is not None]
    assert known
    assert len(known) < len(estimates), "probes have none"
    assert all(found["fits"] and found["seconds"] > 0 for found in known)
    shown = cli(*arguments).out
    assert shown.count("estimate: ") == len(known) + 1
    assert "one after another" in shown
    without = cli("study", STUDIES / "quickstart.yaml", "--dry-run", "--json").tree
    assert all(cell["estimate"] is None for cell in without["cells"])


def test_a_study_that_runs_takes_no_cluster_to_estimate_on(cli: Cli) -> None:
    shown = cli("study", STUDIES / "quickstart.yaml", "--cluster", CPU)
    assert shown.code == 2
    assert "--cluster" in shown.err
    assert "is for --dry-run" in shown.err


def test_an_estimate_loads_nothing_heavy() -> None:
    """A laptop answers at once: torch, ray, deepspeed and mlflow stay out."""
    from tests.test_architecture import HEAVY, loaded_by

    statement = (
        "from launch.cli import main\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    assert main(['estimate', {str(GPT)!r}, '--cluster', {str(H100)!r}]) == 0"
    )
    assert not loaded_by(statement) & set(HEAVY)
