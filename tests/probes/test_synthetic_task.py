"""The one training loop of synthetic tasks, and what it records."""

import math
from typing import Any

import pytest
import torch

from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.probes.settings import SyntheticParams
from pipeline.probes.synthetic_task import fit_to_task
from pipeline.probes.task_memory import Adding
from pipeline.probes.task_states import Parity
from pipeline.probes.task_training import draw_tests, warm_up
from tests.probes.cases import ARMS, GPT, LSTM, make_run, measure

FAST: dict[str, Any] = {
    "learning_rates": [1e-2], "max_steps": 4, "evaluate_every_steps": 2, "batch_samples": 4,
    "test_samples": 16,
}  # fmt: skip
RUNS: dict[str, RunConfig] = {"lstm": make_run({**LSTM, "attention": "none"})}


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


@pytest.mark.parametrize("task", ["parity", "adding"])
def test_every_arm_trains_on_tokens_and_on_numbers(task: str) -> None:
    params = {**FAST, "task": task, "task_params": {"train_lengths": [5, 6]}, "models": ARMS}
    records = measure("synthetic_task", params, RUNS)
    trainings = of_kind(records, "training")
    assert [record["label"] for record in trainings] == list(ARMS)
    for record in trainings:
        # 4 steps of 4 examples, 5 or 6 tokens each.
        assert 4 * 4 * 5 <= record["num_tokens"] <= 4 * 4 * 6
        assert record["steps"] == 4
        assert record["is_censored"]
        assert "steps_to_target" not in record
        assert not record["has_diverged"]
        assert ("baseline_loss" in record) == (task == "adding")
    assert len({record["num_tokens"] for record in trainings}) == 1
    assert [record["step"] for record in of_kind(records, "curve")] == [2, 4] * len(ARMS)


def test_a_task_that_is_learned_ends_there_and_again_the_same() -> None:
    # The label is whether the last bit differs from the first, of two.
    params = {
        **FAST, "task": "even_pairs", "task_params": {"train_lengths": [2, 2]}, "max_steps": 400,
        "evaluate_every_steps": 10, "batch_samples": 16, "seeds": [0, 1],
    }  # fmt: skip
    records = measure("synthetic_task", params, RUNS)
    for record in of_kind(records, "training"):
        assert not record["is_censored"]
        assert record["steps"] == record["steps_to_target"] < 400
        assert record["accuracy"] >= 0.99
        assert record["loss"] < math.log(2)
    again = of_kind(measure("synthetic_task", {**params, "seeds": [1]}, RUNS), "curve")
    assert again == [r for r in of_kind(records, "curve") if r["seed"] == 1]


def test_a_task_with_longer_tests_takes_the_whole_budget_and_is_tested_there() -> None:
    task_params = {"train_lengths": [1, 2], "test_lengths": [2, 12]}
    params = {
        **FAST, "task": "even_pairs", "task_params": task_params, "max_steps": 150,
        "evaluate_every_steps": 25, "batch_samples": 16,
    }  # fmt: skip
    records = measure("synthetic_task", params, RUNS)
    (training,) = of_kind(records, "training")
    assert training["steps"] == 150
    assert training["steps_to_target"] < 150
    trials = {(r["quantity"], r["value"]): r["accuracy"] for r in of_kind(records, "trial")}
    assert set(trials) == {("length", 2), ("length", 12)}
    assert trials["length", 2] > 0.99
    assert {r["num_answers"] for r in of_kind(records, "trial")} == {FAST["test_samples"]}
    assert training["unseen_length_accuracy"] == trials["length", 12]


def test_a_training_that_diverges_is_kept_and_named() -> None:
    params = {**FAST, "task": "adding", "task_params": {"train_lengths": [4, 4]}, "max_steps": 200}
    params |= {"learning_rates": [1e30], "gradient_clipping": 0.0, "warmup_fraction": 0.0}
    records = measure("synthetic_task", params, RUNS)
    (training,) = of_kind(records, "training")
    assert training["has_diverged"]
    assert training["is_censored"]
    assert training["steps"] < 200
    assert "loss" not in training


def test_a_test_spreads_over_the_training_lengths() -> None:
    tests = draw_tests(Parity(train_lengths=(1, 40)), 512)
    assert [test.inputs.shape for test in tests] == [
        (64, length) for length in (1, 7, 12, 18, 23, 29, 34, 40)
    ]
    (only,) = draw_tests(Parity(train_lengths=(9, 9)), 512)
    assert only.inputs.shape == (512, 9)


def test_the_rate_rises_to_its_peak_and_stays() -> None:
    params = SyntheticParams(task="parity", max_steps=100, warmup_fraction=0.1)
    rates = [warm_up(step, params, 2.0) for step in (1, 5, 10, 100)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0])


def test_a_model_takes_positions_and_vocabulary_from_the_task() -> None:
    config = make_run({**GPT, "vocab_size": 99, "max_positions": 16}).model
    fitted = fit_to_task(config, Parity(test_lengths=[256]))
    assert (fitted.max_positions, fitted.resolved_vocab_size(2)) == (256, 2)


def test_numbers_leave_the_tables_of_tokens_alone() -> None:
    from pipeline.models import build_model
    from pipeline.probes.task_training import build_learner

    model = build_model(RUNS["lstm"].model, 2, 0)
    learner = build_learner(model, Adding(), 0)
    trained = {n for n, p in learner.module.named_parameters() if p.requires_grad}
    assert not any(name.endswith("embedding_VD") for name in trained)
    assert {"read.weight", "answer.weight"} <= trained
    assert not torch.equal(
        build_learner(model, Adding(), 1).module.get_parameter("read.weight"),
        learner.module.get_parameter("read.weight"),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "parrity"}, "'parrity' is not one of adding"),
        ({"task": "parity", "task_params": {"lengths": 3}}, "unknown key lengths"),
        ({"task": "parity", "learning_rate": 1.0}, "did you mean learning_rates"),
        ({"task": "parity", "models": {"a": {"family": "gtp"}}}, "did you mean gpt"),
    ],
)
def test_a_training_that_cannot_run_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure("synthetic_task", fields, RUNS)
