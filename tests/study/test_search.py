"""A search gives every family the same trials, and reads coefficients off the best of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.automatic import PUBLISHED_RULE
from pipeline.config.load import dump_yaml, load_study
from pipeline.config.study import SearchConfig, StudyConfig
from pipeline.data.shards import ShardManifest
from pipeline.errors import ConfigError
from pipeline.study.cells import write_cell
from pipeline.study.execute import report_study
from pipeline.study.outcome import StudyResult
from pipeline.study.plan import StudyPlan, plan_study
from pipeline.study.planned import TrainCell
from pipeline.study.search import multiples_of_rule
from pipeline.study.trials import PARAMETERS, draw_trials, place_in_range
from pipeline.tracking.store import write_result
from tests.study.conftest import train_result

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "study" / "search.yaml"
NUM_TRIALS = 16
BEST = 4
OPTIMUM = {"gpt": 0.25, "lstm_attention": 0.5}
"""Family to the best multiple of the published learning rate in these tests."""
TREE: dict[str, Any] = {
    "name": "search",
    "search": {"num_trials": NUM_TRIALS},
    "base": {
        "train": {
            "automatic": True,
            "tokens_per_parameter": 10,
            "sequence_tokens": 32,
            "micro_batch_samples": 4,
        }
    },
    "families": {
        "gpt": {"model": {"family": "gpt", "width": 32, "depth": 2}},
        "lstm_attention": {"model": {"family": "lstm_attention", "depth": 2}},
    },
    "match": {"reference": "gpt"},
}


def search_study(tmp_path: Path, **fields: Any) -> StudyConfig:
    return StudyConfig.model_validate({**TREE, "output_dir": tmp_path, **fields})


@pytest.fixture
def report(tmp_path: Path, manifest: ShardManifest) -> Callable[..., StudyResult]:
    """Give a function that finishes every trial with a loss made up from it, and reports."""

    def write(loss: Callable[[TrainCell], float], *, without: tuple[str, ...] = ()) -> StudyResult:
        study = search_study(tmp_path)
        plan = plan_study(study)
        plan.directory.mkdir(parents=True)
        (plan.directory / "study.yaml").write_text(dump_yaml(study))
        for cell in plan.train_cells:
            run_dir = write_cell(plan, cell, manifest)
            if cell.name not in without:
                write_result(run_dir, train_result(cell, manifest, loss(cell)))
        return report_study(plan.directory)

    return write


def found_in(tmp_path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((tmp_path / "search" / "search.json").read_text())
    return tree


def rate_of(cell: TrainCell) -> float:
    return multiples_of_rule(cell.run)["learning_rate"]


def distance(cell: TrainCell) -> float:
    """A loss that rises with the distance from the best learning rate, on the log scale."""
    return abs(math.log(rate_of(cell) / OPTIMUM[cell.label]))


def by_trial(plan: StudyPlan) -> list[tuple[TrainCell, ...]]:
    cells, width = plan.train_cells, len(plan.families)
    return [cells[i : i + width] for i in range(0, len(cells), width)]


def test_draws_depend_on_seed_and_trial_alone() -> None:
    short = draw_trials(SearchConfig(num_trials=5, seed=3))
    assert draw_trials(SearchConfig(num_trials=9, seed=3))[:5] == short
    assert draw_trials(SearchConfig(num_trials=5, seed=4)) != short


def test_draws_fill_their_ranges_evenly_on_the_log_scale() -> None:
    search = SearchConfig(num_trials=400)
    trials = draw_trials(search)
    for name in PARAMETERS:
        places = [place_in_range(name, getattr(trial, name), search) for trial in trials]
        assert 0.0 <= min(places) < 0.02
        assert 0.98 < max(places) <= 1.0
        # The mean of 400 uniform draws has a standard error of 0.0144.
        assert sum(places) / len(places) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("shipped", [True, False])
def test_every_family_gets_the_same_trials_over_the_same_ranges(
    tmp_path: Path, shipped: bool
) -> None:
    study = load_study(SHIPPED) if shipped else search_study(tmp_path)
    assert study.search is not None
    plan = plan_study(study)
    assert len(by_trial(plan)) == study.search.num_trials
    for trial, cells in zip(draw_trials(study.search), by_trial(plan), strict=True):
        assert [cell.label for cell in cells] == list(plan.families)
        for cell in cells:
            values = multiples_of_rule(cell.run)
            assert values["learning_rate"] == pytest.approx(trial.learning_rate)
            assert values["warmup_tokens"] == pytest.approx(trial.warmup_tokens)
            assert values["beta2"] == trial.beta2
            micro_tokens = cell.run.train.micro_batch_samples * cell.run.train.sequence_tokens
            size = cell.run.model.num_parameters(0).non_embedding
            drawn_tokens = trial.batch_tokens * PUBLISHED_RULE.batch_tokens_at(size)
            largest_move = max(micro_tokens / 2, 0.1 * drawn_tokens) + 1
            assert abs(cell.run.train.global_batch_tokens - drawn_tokens) <= largest_move


def test_the_shipped_search_compares_models_of_equal_size_under_equal_budgets() -> None:
    families = plan_study(load_study(SHIPPED)).families
    for size in ("14k", "38k"):
        pair = [families[f"{kind}_{size}"] for kind in ("gpt", "lstm")]
        counts = [run.model.num_parameters(0).non_embedding for run in pair]
        assert counts[1] == pytest.approx(counts[0], rel=0.002)
        tokens = [run.train.total_tokens for run in pair]
        assert tokens[1] == pytest.approx(tokens[0], rel=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": [0, 1]}, "one seed and no probes"),
        ({"probes": [{"probe": "model_state"}]}, "one seed and no probes"),
        ({"search": {"num_trials": 8, "learning_rate": [2.0, 1.0]}}, "is empty"),
        ({"search": {"num_trials": 8, "beta2": [0.9, 1.0]}}, "stay below 1"),
        ({"search": {"num_trials": 3}}, "greater than or equal to 4"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        search_study(tmp_path, **fields)


def test_a_family_that_states_what_the_search_draws_is_refused(tmp_path: Path) -> None:
    stated = {"model": {"family": "gpt"}, "train": {"optimizer": {"beta2": 0.9}}}
    study = search_study(tmp_path, families={"gpt": stated}, match=None)
    with pytest.raises(ConfigError, match="optimizer.beta2 is what the search draws"):
        plan_study(study)


def test_a_coefficient_is_the_geometric_mean_of_the_best_quarter(
    tmp_path: Path, report: Callable[..., StudyResult]
) -> None:
    assert report(distance).status == "complete"
    found = found_in(tmp_path)
    assert (found["num_trials"], found["num_best"]) == (NUM_TRIALS, BEST)
    plan = plan_study(search_study(tmp_path))
    expected = {}
    for family in OPTIMUM:
        own = sorted((c for c in plan.train_cells if c.label == family), key=distance)
        expected[family] = math.prod(rate_of(cell) for cell in own[:BEST]) ** (1 / BEST)
    rates = [c for c in found["coefficients"] if c["parameter"] == "learning_rate"]
    for rate in rates:
        assert rate["value"] == pytest.approx(expected[rate["family"]])
        assert rate["low"] <= rate["value"] <= rate["high"]
        # The best quarter of a range of 64 = 2^6 spans about 2^1.5 around the optimum.
        assert 2**-0.75 < rate["value"] / OPTIMUM[rate["family"]] < 2**0.75
    assert rates[0]["ratio"] == 1.0
    assert rates[1]["ratio"] == pytest.approx(expected["lstm_attention"] / expected["gpt"])
    assert not any(o["is_at_edge"] for m in found["models"] for o in m["optima"][:1])


def test_a_best_trial_at_the_edge_of_its_range_is_flagged(
    tmp_path: Path, report: Callable[..., StudyResult]
) -> None:
    result = report(rate_of)  # the lower the rate, the better
    for model in found_in(tmp_path)["models"]:
        assert model["optima"][0]["parameter"] == "learning_rate"
        assert model["optima"][0]["is_at_edge"]
    assert any("Edges." in text and "learning rate of gpt" in text for text in result.headline)
    markdown = (tmp_path / "search" / "report.md").read_text()
    assert "at the edge" in markdown
    assert (tmp_path / "search" / "report.html").read_text().startswith("<!doctype html>")


def test_a_best_batch_that_is_the_least_one_tried_is_flagged_too(
    tmp_path: Path, report: Callable[..., StudyResult]
) -> None:
    report(lambda cell: math.log(cell.run.train.global_batch_tokens))
    for model in found_in(tmp_path)["models"]:
        batch = next(o for o in model["optima"] if o["parameter"] == "batch_tokens")
        assert batch["best"] == min(trial["batch_tokens"] for trial in model["trials"])
        assert batch["is_at_edge"]


def test_a_trial_that_one_model_lacks_counts_for_none(
    tmp_path: Path, report: Callable[..., StudyResult]
) -> None:
    result = report(distance, without=("lstm_attention-trial003",))
    assert result.status == "partial"
    assert list(result.missing) == ["lstm_attention-trial003"]
    found = found_in(tmp_path)
    assert found["num_trials"] == NUM_TRIALS - 1
    for model in found["models"]:
        assert 3 not in [trial["index"] for trial in model["trials"]]


def test_a_search_without_a_finished_trial_reports_that(
    tmp_path: Path, report: Callable[..., StudyResult]
) -> None:
    names = tuple(cell.name for cell in plan_study(search_study(tmp_path)).train_cells)
    assert report(distance, without=names).status == "partial"
    assert "no trial was finished by every model" in (tmp_path / "search/report.md").read_text()
