"""Expectations follow the closed forms."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.gpt import GptConfig
from pipeline.config.load import build_run
from pipeline.config.study import StudyConfig
from pipeline.study.estimate import (
    NOMINAL_FLOPS_PER_SECOND,
    START_SECONDS,
    expect_seconds,
    state_bytes_formula,
    training_flops,
)
from pipeline.study.plan import plan_study
from pipeline.study.planned import ProbeCell
from pipeline.study.timeline import Step, append_step, list_failures, read_timeline


def test_model_state_is_split_stage_by_stage() -> None:
    # 1000 fp32 parameters on 4 ranks: 4 kB whole, 1 kB when split.
    stages = [state_bytes_formula(1000, stage, 4) for stage in range(4)]
    assert [s.parameters for s in stages] == [4000, 4000, 4000, 1000]
    assert [s.gradients for s in stages] == [4000, 4000, 1000, 1000]
    assert [s.moments for s in stages] == [8000, 2000, 2000, 2000]
    assert [s.master_weights for s in stages] == [0, 1000, 1000, 1000]
    assert [s.published for s in stages] == [16000, 10000, 7000, 4000]
    assert [s.total for s in stages] == [16000, 11000, 8000, 5000]


def test_one_rank_holds_the_published_bytes_at_every_stage() -> None:
    assert {state_bytes_formula(10, stage, 1).published for stage in range(4)} == {160}


def test_training_flops_are_those_of_a_token_times_the_tokens() -> None:
    run = build_run({"model": {"family": "gpt"}, "train": {"total_tokens": 16384}}, "test")
    per_token = GptConfig().flops_per_token(500, run.train.sequence_tokens)
    assert training_flops(run, 500) == per_token * 16384


def test_expected_seconds_fall_with_the_rate_that_was_measured(study_config: StudyConfig) -> None:
    cell = plan_study(study_config).train_cells[0]
    nominal = expect_seconds(cell, 300, None)
    twice = expect_seconds(cell, 300, 2 * NOMINAL_FLOPS_PER_SECOND)
    assert nominal is not None
    assert twice is not None
    assert nominal - START_SECONDS == pytest.approx(2 * (twice - START_SECONDS))


def test_an_unknown_probe_has_no_expectation(study_config: StudyConfig) -> None:
    cell = plan_study(study_config).probe_cells[0]
    other = ProbeCell(
        name="other-w1", probe="other", params={}, runs=cell.runs, num_workers=1
    )  # fmt: skip
    assert expect_seconds(other, 300, None) is None


def test_a_timeline_survives_a_torn_last_line_and_tells_the_latest_failure(tmp_path: Path) -> None:
    directory = tmp_path
    times: dict[str, Any] = {"started_unix_seconds": 0.0, "seconds": 1.0}
    append_step(
        directory, Step(phase="train", cell="a", outcome="failed", reason="lost rank 1", **times)
    )
    append_step(
        directory, Step(phase="train", cell="b", outcome="failed", reason="lost rank 0", **times)
    )
    append_step(directory, Step(phase="train", cell="a", outcome="complete", **times))
    with (directory / "timeline.jsonl").open("a") as stream:
        stream.write('{"phase": "tra')
    steps = read_timeline(directory)
    assert [step.cell for step in steps] == ["a", "b", "a"]
    assert list_failures(steps) == {"b": "lost rank 0"}
    append_step(directory, Step(phase="train", cell="b", outcome="complete", **times))
    assert [step.cell for step in read_timeline(directory)] == ["a", "b", "a", "b"]
