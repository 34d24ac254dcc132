"""A ladder's cells: sizes that are matched, trunks that keep what their branches begin in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.load import dump_yaml
from pipeline.config.study import StudyConfig
from pipeline.data.shards import ShardManifest
from pipeline.errors import ConfigError
from pipeline.study.cells import write_cell
from pipeline.study.execute import report_study
from pipeline.study.outcome import StudyResult
from pipeline.study.plan import plan_study
from pipeline.study.planned import Rung, TrainCell
from pipeline.study.scaling import ScalingLaw
from pipeline.tracking.events import EventWriter
from pipeline.tracking.store import measured, write_result
from pipeline.training.branching import check_same_run
from tests.study.conftest import train_result

SIZES = [8_000, 20_000]
TOKENS = [2_560, 5_120, 10_240]


def ladder_study(tmp_path: Path, **fields: Any) -> StudyConfig:
    tree: dict[str, Any] = {
        "name": "ladder",
        "output_dir": tmp_path,
        "base": {
            "train": {
                "global_batch_tokens": 256,
                "sequence_tokens": 32,
                "micro_batch_samples": 4,
                "schedule": {"warmup_fraction": 0.1},
            },
        },
        "families": {
            "gpt": {"model": {"family": "gpt", "depth": 2, "heads": 2}},
            "lstm": {"model": {"family": "lstm_attention", "depth": 2, "heads": 2}},
        },
        "match": {"reference": "gpt", "tolerance_fraction": 0.05},
        "seeds": [0, 1],
        "ladder": {"sizes": SIZES, "tokens": TOKENS},
    }
    return StudyConfig.model_validate(tree | fields)


def rung_of(cell: TrainCell) -> Rung:
    assert cell.rung is not None
    return cell.rung


def test_every_size_seed_and_family_has_a_trunk_and_a_branch_for_each_length(
    tmp_path: Path,
) -> None:
    cells = plan_study(ladder_study(tmp_path)).train_cells
    assert len(cells) == len(SIZES) * 2 * 2 * (1 + len(TOKENS))
    assert len({cell.name for cell in cells}) == len(cells)
    branches = [cell for cell in cells if not rung_of(cell).is_trunk]
    assert {(c.label, rung_of(c).size, c.run.seed, rung_of(c).tokens) for c in branches} == {
        (label, size, seed, tokens)
        for label in ("gpt", "lstm") for size in SIZES for seed in (0, 1) for tokens in TOKENS
    }  # fmt: skip
    for cell in cells:
        count = cell.run.model.num_parameters(0).non_embedding
        assert count == pytest.approx(rung_of(cell).size, rel=0.05)


def test_a_trunk_comes_first_and_is_the_same_run_as_its_branches(tmp_path: Path) -> None:
    cells = plan_study(ladder_study(tmp_path)).train_cells
    names = [cell.name for cell in cells]
    for place, cell in enumerate(cells):
        rung = rung_of(cell)
        if rung.is_trunk:
            assert rung.trunk == cell.name
            continue
        assert names.index(rung.trunk) < place
        trunk = cells[names.index(rung.trunk)].run
        branch = cell.run.branch
        assert branch is not None
        assert branch.run_dir == tmp_path / "ladder" / "runs" / trunk.name
        assert branch.step in trunk.checkpoint.keep_steps
        # As the branch itself checks before it begins.
        check_same_run(cell.run, trunk, branch.run_dir, branch.step)
        share = 1 - branch.step / cell.run.train.total_steps
        assert share == pytest.approx(0.2, abs=0.5 / cell.run.train.total_steps)


def test_lengths_by_parameters_follow_the_rule_of_the_size(tmp_path: Path) -> None:
    study = ladder_study(
        tmp_path,
        base={
            "train": {"automatic": True, "sequence_tokens": 32, "micro_batch_samples": 4},
        },
        ladder={"sizes": SIZES, "tokens_per_parameter": [5.0, 10.0, 20.0]},
        seeds=[0],
    )
    cells = [c for c in plan_study(study).train_cells if not rung_of(c).is_trunk]
    for cell in cells:
        ratio = rung_of(cell).tokens / rung_of(cell).size
        assert min(abs(ratio / wanted - 1) for wanted in (5.0, 10.0, 20.0)) < 0.05
        assert cell.run.train.automatic is False
    rates = {rung_of(c).size: c.run.train.optimizer.learning_rate for c in cells}
    assert rates[SIZES[0]] > rates[SIZES[1]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ladder": {"sizes": SIZES, "tokens": [2_560, 2_600]}}, "take lengths further apart"),
        ({"ladder": {"sizes": [10], "tokens": TOKENS}}, "parameters"),
        (
            {"base": {"train": {"total_tokens": 2_560, "global_batch_tokens": 256}}},
            "train.total_tokens is set by the ladder",
        ),
        (
            {"base": {"train": {"global_batch_tokens": 256, "sequence_tokens": 32,
                                "micro_batch_samples": 4, "schedule": {"warmup_fraction": 0.5}}}},
            "the warm-up takes",
        ),
    ],
)  # fmt: skip
def test_a_ladder_that_cannot_be_built_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_study(ladder_study(tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"match": None}, "match.reference"),
        ({"ladder": {"sizes": SIZES}}, "tokens or tokens_per_parameter"),
        ({"ladder": {"sizes": [2, 1], "tokens": [1]}}, "has to rise"),
        ({"probes": [{"probe": "model_state"}]}, "takes no search and no probes"),
    ],
)
def test_a_ladder_config_that_contradicts_itself_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ladder_study(tmp_path, **fields)


PLANTED = {
    "gpt": ScalingLaw(floor=1.5, a=30.0, b=80.0, alpha=0.30, beta=0.35),
    "lstm": ScalingLaw(floor=1.5, a=12.0, b=80.0, alpha=0.20, beta=0.35),
}
STEP_SECONDS = 0.25
NOISE = 0.002


def finish(run_dir: Path, cell: TrainCell, manifest: ShardManifest) -> None:
    """Leave a result whose loss is that of the planted law, with the trunk's own noise."""
    rung, steps = rung_of(cell), cell.run.train.total_steps
    result = train_result(cell, manifest, 0.0)
    trunk_noise = np.random.default_rng([cell.run.seed, rung.size, ord(cell.label[0])]).normal()
    law = PLANTED[cell.label]
    loss = law.predict(result.num_parameters.total, rung.tokens) * (1 + NOISE * trunk_noise)
    # What a trunk is scored at is never to be read.
    value = 99.0 if rung.is_trunk else loss
    own_steps = steps - (cell.run.branch.step if cell.run.branch else 0)
    with EventWriter(run_dir / "events.jsonl", attempt=1) as events:
        events.write("start", steps - own_steps)
        for step in cell.run.checkpoint.keep_steps:
            spent = {"train": STEP_SECONDS * step, "wall": STEP_SECONDS * step}
            events.write("checkpoint", step, {"spent_seconds": spent})
    write_result(
        run_dir,
        result.model_copy(
            update={
                "metrics": {"eval/loss": measured("eval/loss", value)},
                "steps": steps,
                "goodput": {"train_seconds": STEP_SECONDS * own_steps},
            }
        ),
    )


@pytest.fixture
def report(tmp_path: Path, manifest: ShardManifest) -> Callable[..., StudyResult]:
    def write(*, without: tuple[str, ...] = (), **fields: Any) -> StudyResult:
        study = ladder_study(
            tmp_path,
            ladder={"sizes": [4_000, 8_000, 16_000, 32_000], "tokens": TOKENS},
            seeds=[0, 1, 2],
            **fields,
        )
        plan = plan_study(study)
        plan.directory.mkdir(parents=True)
        (plan.directory / "study.yaml").write_text(dump_yaml(study))
        for cell in plan.train_cells:
            run_dir = write_cell(plan, cell, manifest)
            if cell.name not in without:
                finish(run_dir, cell, manifest)
        return report_study(plan.directory)

    return write


def test_planted_laws_and_their_difference_come_back(
    report: Callable[..., StudyResult], tmp_path: Path
) -> None:
    result = report()
    assert result.status == "complete"
    found = json.loads((tmp_path / "ladder" / "ladder.json").read_text())
    assert len(found["points"]) == 2 * 4 * 3 * len(TOKENS)
    assert max(point["loss"] for point in found["points"]) < 20.0
    for law in found["laws"]:
        planted = PLANTED[law["label"]]
        for name, value in (("alpha", planted.alpha), ("beta", planted.beta)):
            found_constant = law["constants"][name]
            # One draw of the noise, so four standard errors; 95% intervals are tested on hundreds.
            reach = found_constant["high"] - found_constant["low"]
            assert abs(found_constant["value"] - value) < reach
    (comparison,) = found["comparisons"]
    assert comparison["chosen"] == "M2"
    planted = PLANTED["lstm"].compute_exponent - PLANTED["gpt"].compute_exponent
    effect = comparison["differences"]["compute_exponent"]
    assert abs(effect["value"] - planted) < 3 * effect["standard_error"]
    assert any("the exponents differ" in sentence for sentence in result.headline)
    page = (tmp_path / "ladder" / "report.html").read_text()
    assert "ladder-tokens" in page
    assert "Loss over training FLOPs" in (tmp_path / "ladder" / "report.md").read_text()


def test_device_seconds_count_the_trunk_up_to_the_branch(
    report: Callable[..., StudyResult], tmp_path: Path
) -> None:
    report()
    found = json.loads((tmp_path / "ladder" / "ladder.json").read_text())
    for point in found["points"]:
        steps = point["tokens"] / 256
        # Two ranks; every step took as long, in the trunk and after it.
        assert point["device_seconds"] == pytest.approx(2 * STEP_SECONDS * steps)


def test_a_run_that_is_missing_is_named_and_in_no_number(
    report: Callable[..., StudyResult], tmp_path: Path
) -> None:
    name = "lstm-n8000-seed1-d5120"
    result = report(without=(name,))
    assert (result.status, list(result.missing)) == ("partial", [name])
    found = json.loads((tmp_path / "ladder" / "ladder.json").read_text())
    assert name not in {point["run"] for point in found["points"]}
    assert name in (tmp_path / "ladder" / "report.md").read_text()


def test_too_few_sizes_for_a_law_are_said(tmp_path: Path, manifest: ShardManifest) -> None:
    study = ladder_study(tmp_path, seeds=[0])
    plan = plan_study(study)
    plan.directory.mkdir(parents=True)
    (plan.directory / "study.yaml").write_text(dump_yaml(study))
    for cell in plan.train_cells:
        finish(write_cell(plan, cell, manifest), cell, manifest)
    headline = report_study(plan.directory).headline
    assert any("No law for gpt" in sentence and "3 sizes" in sentence for sentence in headline)


def test_one_trunk_a_size_gives_no_interval(tmp_path: Path, manifest: ShardManifest) -> None:
    ladder = {"sizes": [4_000, 8_000, 16_000], "tokens": TOKENS}
    study = ladder_study(tmp_path, seeds=[0], ladder=ladder)
    plan = plan_study(study)
    plan.directory.mkdir(parents=True)
    (plan.directory / "study.yaml").write_text(dump_yaml(study))
    for cell in plan.train_cells:
        finish(write_cell(plan, cell, manifest), cell, manifest)
    headline = report_study(plan.directory).headline
    assert any("gives no interval, so this decides nothing" in sentence for sentence in headline)
    found = json.loads((tmp_path / "ladder" / "ladder.json").read_text())
    assert all(c["low"] is None for law in found["laws"] for c in law["constants"].values())
